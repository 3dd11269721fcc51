"""The dense plan equals transformers, for every family and variant, tiny and real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quicksilver
from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.families.quantize import quantize_model
from quicksilver.plan import Plan
from quicksilver.weights.config import QuantizationConfig
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


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_quantized_weights_are_read_as_in_transformers(family: str) -> None:
    model, ids = tiny.from_config(tiny.CONFIGS[family]()), tiny.token_ids(40)
    quantize_model(model, QuantizationConfig())
    found = quicksilver.accelerate(model, kernels="torch")(ids[None]).logits[0]
    torch.testing.assert_close(found, reference(model, ids), atol=tolerances.LOGITS[torch.float32], rtol=0)


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


FULL, SLIDING = tiny.FULL, tiny.SLIDING
BY_KIND = [name for name in tiny.FAMILIES if name in tiny.WINDOWED and hasattr(tiny.config_of(name), "layer_types")]
WITHOUT_WINDOWS = [family for family in tiny.FAMILIES if not hasattr(tiny.config_of(family), "sliding_window")]
ALL_IN_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


def windowed(family: str, **options: Any) -> Any:
    """Return a family's configuration with other windows."""
    config = tiny.CONFIGS[family]()
    own = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    return type(config)(**{**{key: value for key, value in config.to_dict().items() if key not in own}, **options})


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("mistral", {"sliding_window": None, "layer_types": [FULL, SLIDING] * 2}, "layer 1 .sliding_window=None"),
        ("qwen2", {"layer_types": [FULL, FULL, SLIDING, FULL]}, "layer 2 .sliding_window=None"),
        ("qwen3", {**ALL_IN_WINDOWS, "layer_types": [FULL, "chunked_attention"] * 2}, "layer 1 .*chunked_attention"),
        *((family, {"sliding_window": 8}, "layer 0 .sliding_window=8.* without `w") for family in WITHOUT_WINDOWS),
        ("llama", {"sliding_window": 8, "layer_types": [FULL, SLIDING] * 2}, "layer 1 .sliding_window=8"),
        ("llama", {"attention_chunk_size": 8}, "layer 0 .*chunked_attention"),
    ],
)
def test_windows_that_transformers_does_not_follow_are_refused_by_layer(
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


@pytest.mark.parametrize(
    ("family", "options", "windows"),
    [
        ("mistral", {"sliding_window": 8}, [8] * 4),
        ("mistral", {"sliding_window": 8, "layer_types": [FULL] * 4}, [8] * 4),
        ("phi3", {"sliding_window": 1}, [1] * 4),
        ("qwen2", ALL_IN_WINDOWS, [8] * 4),
        ("qwen2", {**ALL_IN_WINDOWS, "max_window_layers": 3}, [None, None, None, 8]),
        ("qwen3", {**ALL_IN_WINDOWS, "sliding_window": 63}, [63] * 4),
        ("qwen3", {**ALL_IN_WINDOWS, "layer_types": [FULL, FULL, SLIDING, FULL]}, [None, None, 8, None]),
        ("gemma2", {"sliding_window": 5}, [5, None, 5, None]),
        ("smollm3", {**ALL_IN_WINDOWS, "no_rope_layers": [1, 0, 1, 1]}, [None, 8, None, None]),
        *((name, {"sliding_window": 7, "layer_types": [FULL, SLIDING] * 2}, [None, 7, None, 7]) for name in BY_KIND),
    ],
)
def test_windows_are_those_that_transformers_gives_layer_by_layer(
    family: str, options: dict[str, Any], windows: list[int | None]
) -> None:
    model, ids = tiny.from_config(windowed(family, **options)), tiny.token_ids(40)
    accelerated = quicksilver.accelerate(model)
    assert [layer.window for layer in accelerated.adapter.spec.layers] == windows
    wanted = reference(model, ids)
    torch.testing.assert_close(accelerated(ids[None]).logits[0], wanted, atol=tolerances.LOGITS[torch.float32], rtol=0)
    full = tiny.from_config(windowed(family, **{**options, "sliding_window": tiny.MAX_POSITIONS}))
    assert not torch.allclose(reference(full, ids), wanted, atol=0.01) or 63 in windows


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_keys_is_refused(window: int) -> None:
    with pytest.raises(ModelError, match=f"mistral: sliding_window is {window}"):
        quicksilver.accelerate(tiny.from_config(windowed("mistral", sliding_window=window)))


@pytest.mark.parametrize("name", tiny.WINDOWED)
def test_greedy_tokens_past_the_window_are_those_of_transformers(name: str) -> None:
    model, ids = tiny.model(name), tiny.token_ids(11, seed=3)[None]
    cached = model.config.sliding_window > 1  # transformers' cache keeps every entry where the window is 1
    wanted = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, use_cache=cached)
    found = quicksilver.accelerate(model).generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("family", "kinds"), [("mistral", None), ("phi3", None), ("qwen2", [FULL, FULL, SLIDING, FULL])]
)
def test_a_window_declared_later_is_followed_from_the_next_call_on(family: str, kinds: list[str] | None) -> None:
    model, ids = tiny.from_config(tiny.CONFIGS[family]()), tiny.token_ids(9)[None]
    accelerated = quicksilver.accelerate(model)
    before = accelerated(ids).logits
    model.config.sliding_window = 4
    if kinds is not None:
        model.config.layer_types = kinds
        for layer, kind in zip(model.model.layers, kinds, strict=True):
            layer.attention_type = kind  # where transformers 5.0 keeps it
        model.model.has_sliding_layers = True
    after = accelerated(ids).logits
    torch.testing.assert_close(after[0], reference(model, ids[0]), atol=tolerances.LOGITS[torch.float32], rtol=0)
    assert not torch.allclose(after, before, atol=0.01)


@pytest.mark.parametrize(
    "family", [family for family in tiny.FAMILIES if hasattr(tiny.config_of(family), "use_bidirectional_attention")]
)
def test_attention_to_later_tokens_is_refused_by_name(family: str) -> None:
    config = tiny.CONFIGS[family]()
    config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedModelError, match=f"{family}: use_bidirectional_attention=True is not supported"):
        quicksilver.accelerate(tiny.from_config(config))


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family in tiny.ROTATED])
def test_heads_rotated_in_part_are_refused_by_name(family: str) -> None:
    config = tiny.CONFIGS[family]()
    of_all = config.rope_parameters
    for rope in [of_all] if "rope_type" in of_all else of_all.values():
        rope["partial_rotary_factor"] = 0.5
    with pytest.raises(UnsupportedModelError, match=rf"{family}: .*partial_rotary_factor=0.5"):
        quicksilver.accelerate(tiny.from_config(config))


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name in tiny.ROTATED])
@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"local": {"rope_type": "default"}}, "'local' are not supported: 'rope_type' is missing"),
        ({FULL: {}, SLIDING: None}, rf"'rope_type' is missing for layers of kind '{FULL}'"),
    ],
)
def test_rotary_parameters_of_another_layout_are_refused_by_their_keys(
    family: str, parameters: dict[str, Any], reason: str
) -> None:
    model = tiny.from_config(tiny.config_of(family))
    model.config.rope_parameters = parameters
    with pytest.raises(UnsupportedModelError, match=f"{family}: rope_parameters with the keys .*{reason}"):
        quicksilver.accelerate(model)


@pytest.mark.parametrize("name", ["llama-rope-longrope", "phi3-longrope"])
def test_longrope_is_limited_to_the_length_at_which_its_frequencies_switch(name: str) -> None:
    engine = decoder(tiny.model(name), Plan.dense())
    assert engine.spec.max_positions == tiny.MAX_POSITIONS
