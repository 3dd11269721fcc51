"""The dense plan equals transformers, for every family and variant, tiny and real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quicksilver
from quicksilver.errors import UnsupportedModelError
from quicksilver.plan import Plan
from tests import tiny, tolerances
from tests.engines import decoder, run_chunks, run_steps, run_whole

REAL = ("stories260K", "stories3M", "wiki6M")


def reference(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize("name", [*tiny.FAMILIES, *tiny.VARIANTS])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_dense_equals_transformers(name: str, backend: Any) -> None:
    model, ids = tiny.model(name), tiny.token_ids(tiny.MAX_POSITIONS)
    logits = run_whole(decoder(model, Plan.dense(), attention=backend), ids).logits
    torch.testing.assert_close(logits, reference(model, ids), atol=tolerances.LOGITS[torch.float32], rtol=0)


@pytest.mark.parametrize("name", [*tiny.FAMILIES, *tiny.VARIANTS])
def test_dense_decode_and_chunks_equal_transformers(name: str) -> None:
    model, ids = tiny.model(name), tiny.token_ids(24)
    engine, expected = decoder(model, Plan.dense()), reference(model, ids)
    for run in (run_steps(engine, ids, prompt=5), run_chunks(engine, ids, [1, 7, 2, 14])):
        torch.testing.assert_close(run.logits, expected, atol=tolerances.LOGITS[torch.float32], rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dense_equals_transformers_in_bfloat16(family: str) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]()).bfloat16()
    ids = tiny.token_ids(32)
    logits = run_whole(decoder(model, Plan.dense()), ids).logits
    assert logits.dtype == torch.bfloat16
    expected = reference(model, ids).float()
    error = (logits.float() - expected).abs().max() / expected.abs().max()
    assert error < tolerances.LOGITS[torch.bfloat16]


@pytest.mark.parametrize("name", REAL)
def test_dense_equals_transformers_on_real_models(name: str, shared_dir: Any) -> None:
    path = shared_dir / "data" / "models" / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(path)("Once upon a time there was a river.", return_tensors="pt").input_ids[0]
    logits = run_whole(decoder(model, Plan.dense()), ids).logits
    torch.testing.assert_close(logits, reference(model, ids), atol=tolerances.LOGITS[torch.float32], rtol=0)


@pytest.mark.parametrize(("name", "perplexity"), [("stories260K", 1.4709), ("stories3M", 1.5387)])
def test_real_models_have_their_published_loss(name: str, perplexity: float, shared_dir: Any) -> None:
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she"
        " saw a big, red ball. She wanted to play with it, but it was too high."
    )
    path = shared_dir / "data" / "models" / name
    model, ids = quicksilver.load(path), AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    assert torch.exp(model(ids, labels=ids).loss).item() == pytest.approx(perplexity, abs=tolerances.PERPLEXITY)


FULL, SLIDING = "full_attention", "sliding_attention"
ALL_IN_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


def windowed(family: str, **options: Any) -> Any:
    """Return a family's configuration with other windows."""
    config = tiny.CONFIGS[family]()
    own = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    return type(config)(**{**{key: value for key, value in config.to_dict().items() if key not in own}, **options})


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "layer 0 .sliding_window=8"),
        ("mistral", {"sliding_window": 8, "layer_types": [FULL] * 4}, "layer 0 .sliding_window=8"),
        ("mistral", {"sliding_window": None, "layer_types": [FULL, SLIDING] * 2}, "layer 1 .sliding_window=None"),
        ("qwen2", ALL_IN_WINDOWS, "layer 0 .sliding_window=8"),
        ("qwen2", {**ALL_IN_WINDOWS, "max_window_layers": 3}, "layer 3 .sliding_window=8"),
        ("qwen3", {**ALL_IN_WINDOWS, "sliding_window": 63}, "layer 0 .sliding_window=63"),
        ("qwen3", {**ALL_IN_WINDOWS, "layer_types": [FULL, FULL, SLIDING, FULL]}, "layer 2 .sliding_window=8"),
        ("llama", {"sliding_window": 8}, "layer 0 .sliding_window=8"),
        ("llama", {"sliding_window": 8, "layer_types": [FULL, SLIDING] * 2}, "layer 1 .sliding_window=8"),
        ("llama", {"attention_chunk_size": 8}, "layer 0 .*chunked_attention"),
        ("gpt2", {"sliding_window": 8}, "layer 0 .sliding_window=8"),
    ],
)
def test_windows_that_transformers_gives_are_refused_by_layer(
    family: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{family}: .*{reason}"):
        quicksilver.accelerate(tiny.from_config(windowed(family, **options)))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {**ALL_IN_WINDOWS, "max_window_layers": 4}),
        ("qwen2", {**ALL_IN_WINDOWS, "max_window_layers": 28}),
        ("qwen2", {**ALL_IN_WINDOWS, "use_sliding_window": False}),
        ("qwen3", {**ALL_IN_WINDOWS, "layer_types": [FULL] * 4}),
        ("qwen3", {**ALL_IN_WINDOWS, "sliding_window": tiny.MAX_POSITIONS}),
        ("mistral", {"sliding_window": 10 * tiny.MAX_POSITIONS}),
        ("llama", {"sliding_window": 8, "layer_types": [FULL] * 4}),
    ],
)
def test_windows_that_no_layer_has_do_not_matter(family: str, options: dict[str, Any]) -> None:
    model, ids = tiny.from_config(windowed(family, **options)), tiny.token_ids(tiny.MAX_POSITIONS)
    logits = quicksilver.accelerate(model)(ids[None]).logits[0]
    torch.testing.assert_close(logits, reference(model, ids), atol=tolerances.LOGITS[torch.float32], rtol=0)


@pytest.mark.parametrize(("family", "kinds"), [("mistral", None), ("qwen2", [FULL, FULL, SLIDING, FULL])])
def test_a_window_declared_later_is_refused_at_the_next_call(family: str, kinds: list[str] | None) -> None:
    model, ids = tiny.from_config(tiny.CONFIGS[family]()), tiny.token_ids(9)[None]
    accelerated = quicksilver.accelerate(model)
    accelerated(ids)
    model.config.sliding_window = 4
    if kinds is not None:
        model.config.layer_types = kinds
    with pytest.raises(UnsupportedModelError, match=f"layer {0 if kinds is None else 2} .sliding_window=4"):
        accelerated(ids)


def test_longrope_is_limited_to_the_length_at_which_its_frequencies_switch() -> None:
    engine = decoder(tiny.model("llama-rope-longrope"), Plan.dense())
    assert engine.spec.max_positions == tiny.MAX_POSITIONS
