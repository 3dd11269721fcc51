"""The comparison's gate: logits of every token, and those that the timed prefill itself comes to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config

import quicksilver
from benchmarks.gate import GateError
from benchmarks.peers import files, ours
from benchmarks.peers.engines import HUGGINGFACE, Q8, TorchEngine
from benchmarks.peers.measuring import References, Settings, check
from benchmarks.peers.subjects import Subject
from quicksilver.families.quantize import quantize_model
from quicksilver.ops import native
from quicksilver.weights.config import QuantizationConfig
from tests import tiny, tolerances

_IDS = list(range(3, 43))
_SETTINGS = Settings(
    threads=1, rounds=1, new_tokens=1, prompt_tokens=4, prefill_tokens=40, quality_tokens=20, quick=True
)


class Known:
    """An engine of given logits; what it is asked for is noted."""

    def __init__(self, name: str, tokens: np.ndarray, prefill: np.ndarray) -> None:
        self.name, self.details = name, {}
        self._tokens, self._prefill = tokens, prefill
        self.asked: list[Any] = []

    def tune(self, ids: Sequence[int], prompt: int, prefill: int) -> None:
        self.asked.append("tune")

    def logits(self, ids: Sequence[int], singly: int) -> np.ndarray:
        return self._tokens

    def prefill(self, ids: Sequence[int]) -> float:
        self.asked.append(ids)
        return 0.0

    def prefilled(self) -> np.ndarray:
        self.asked.append("prefilled")
        return self._prefill


@pytest.fixture
def references() -> References:
    values = np.random.default_rng(0).normal(size=(21, 50)).astype(np.float32)
    return References(values[:20], values[20:])


def test_both_comparisons_are_kept_for_the_rows(references: References) -> None:
    engine = Known(ours.UNIFORM_8, references.tokens, references.prefill + np.float32(0.01))
    check([engine], _SETTINGS, _IDS, references)  # pyright: ignore[reportArgumentType]
    assert engine.asked == ["tune", _IDS, "prefilled"]
    quality, after = engine.details["quality"], engine.details["prefill_quality"]
    assert (quality["max_abs"], quality["tokens"], after["tokens"]) == (0.0, 20, 1)
    assert after["max_abs"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("scale", [0.5, np.nan])
def test_a_prompt_that_comes_to_other_logits_stops_the_run_though_all_others_are_right(
    references: References, scale: float
) -> None:
    wrong = Known(ours.UNIFORM_8, references.tokens, references.prefill * np.float32(scale))
    right = Known(Q8, references.tokens, references.prefill)
    with pytest.raises(GateError, match=r"^uniform-8: logits after the prompt that is timed differ"):
        check([right, wrong], _SETTINGS, _IDS, references)  # pyright: ignore[reportArgumentType]


def test_right_logits_after_the_prompt_do_not_excuse_the_others(references: References) -> None:
    wrong = Known(ours.UNIFORM_8, references.tokens * np.float32(0.5), references.prefill)
    with pytest.raises(GateError, match=r"^uniform-8: logits differ"):
        check([wrong], _SETTINGS, _IDS, references)  # pyright: ignore[reportArgumentType]


def test_what_is_compared_is_what_the_timed_call_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(ours.UNIFORM_8, Q8, quicksilver.accelerate(tiny.quantized("gpt2"), "uniform-8bit"))
    returned = []
    call = type(engine.model).forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        returned.append((kwargs["logits_to_keep"], output.logits))
        return output

    monkeypatch.setattr(type(engine.model), "forward", spy)
    engine.prefill(_IDS)
    ((keep, logits),) = returned
    assert keep == 1
    assert engine.prefilled().tolist() == logits[0].tolist()
    assert len(returned) == 1


def test_the_reference_of_a_prompt_is_the_float_models_last_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "call_apart", lambda function, *given: function(*given))  # in this process, as it is
    monkeypatch.setattr(files, "set_up_torch", lambda threads: None)
    model = tiny.model("gpt2")
    model.save_pretrained(tmp_path / "float")
    subject = Subject("gpt2", tmp_path, tmp_path / "float", is_random=False)
    said: list[str] = []
    last = files.reference_logits(subject, _IDS, 1, 1, said.append)
    whole = files.reference_logits(subject, _IDS, len(_IDS), 1, said.append)
    with torch.inference_mode():
        expected = model(torch.tensor([_IDS])).logits[0].numpy()
    np.testing.assert_allclose(whole, expected, atol=tolerances.LOGITS[torch.float32])
    np.testing.assert_allclose(last, expected[-1:], atol=tolerances.LOGITS[torch.float32])
    assert len(said) == 2  # neither was taken for the other
    engine = TorchEngine(HUGGINGFACE, HUGGINGFACE, model)
    engine.prefill(_IDS)
    np.testing.assert_allclose(engine.prefilled(), last, atol=tolerances.LOGITS[torch.float32])


@pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")
def test_a_prompt_gives_the_logits_of_its_last_token_among_those_of_every_token() -> None:
    """So that what is compared is what is timed."""
    model = tiny.from_config(GPT2Config(**{**tiny.CONFIGS["gpt2"]().to_dict(), "n_positions": 256}))
    quantize_model(model, QuantizationConfig(embeddings=False))
    engine = TorchEngine(ours.UNIFORM_8, Q8, quicksilver.accelerate(model, "uniform-8bit"))
    prompt = _IDS * 5
    engine.prefill(prompt)
    after, last = engine.prefilled(), engine.logits(prompt, 0)[-1:]
    assert np.array_equal(after, last)
