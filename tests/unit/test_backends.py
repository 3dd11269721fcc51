"""Who runs the layers is decided once, with a reason, and said where a user looks."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch

import quicksilver
from quicksilver.ops import native
from quicksilver.plan import Plan
from quicksilver.rules import CosineFusionRule, FusionConfig, HaltingConfig, KVConfig, RelativeDriftRule
from tests import tiny

needs_kernels = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")
REASONS = {
    "plain": (lambda: (tiny.model("llama"), "auto"), "its weights are plain; the kernels read quantized ones"),
    "asked": (lambda: (tiny.quantized("llama"), "torch"), "the kernels do not read its weights"),
}


@pytest.mark.parametrize("name", REASONS)
def test_pytorch_says_why_the_kernels_do_not_run(name: str) -> None:
    make, reason = REASONS[name]
    model, kernels = make()
    accelerated = quicksilver.accelerate(model, kernels=kernels)
    assert (accelerated.backend.name, accelerated.backend.reason) == ("pytorch", reason)
    accelerated(tiny.token_ids(4)[None])
    assert f"layers run by   PyTorch ({reason})" in accelerated.stats.summary()


@needs_kernels
def test_kernels_need_no_reason() -> None:
    accelerated = quicksilver.accelerate(tiny.quantized("llama"), kernels="native")
    assert (accelerated.backend.name, accelerated.backend.reason) == ("native", None)
    accelerated(tiny.token_ids(4)[None])
    assert accelerated.stats.summary().endswith("layers run by   compiled kernels")


@needs_kernels
def test_what_pytorch_runs_in_the_kernels_place_is_counted_with_the_reason() -> None:
    plan = Plan("fuses", fusion=FusionConfig(CosineFusionRule(-1.0), layers=(1,), protect_first=0))
    accelerated = quicksilver.accelerate(tiny.quantized("llama"), plan, kernels="native")
    cache = accelerated(tiny.token_ids(4)[None], logits_to_keep=1, use_cache=True).past_key_values
    assert accelerated.stats.backend_fallbacks == {"tokens fuse": tiny.NUM_LAYERS}
    said = f"layers run by   compiled kernels (PyTorch {tiny.NUM_LAYERS} times: tokens fuse)"
    assert accelerated.stats.summary().endswith(said)
    accelerated(torch.tensor([[5]]), past_key_values=cache)
    assert accelerated.stats.backend_fallbacks == {}


def test_a_mechanism_that_is_off_makes_no_call() -> None:
    accelerated = quicksilver.accelerate(tiny.model("llama"), Plan.dense())
    cache = accelerated(tiny.token_ids(4)[None]).past_key_values
    called = calls_of(lambda: accelerated(torch.tensor([[5]]), past_key_values=cache))
    assert not {file for file in called if "/rules/" in file or "/steps/halting" in file or "/steps/bits" in file}
    layers = next(functions for file, functions in called.items() if file.endswith("backends/torch.py"))
    assert not layers & {"_split", "_fill", "_project"}


def test_a_mechanism_that_is_on_is_seen_by_that_test() -> None:
    plan = Plan("halts", HaltingConfig(RelativeDriftRule(1e9), min_layer=1, protect_first=0))
    accelerated = quicksilver.accelerate(tiny.model("llama"), plan)
    assert any("/steps/halting" in file for file in calls_of(lambda: accelerated(tiny.token_ids(4)[None])))


def calls_of(run: Any) -> dict[str, set[str]]:
    """Return the package's functions that a call makes, by file."""
    seen: dict[str, set[str]] = {}

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "/quicksilver/" in frame.f_code.co_filename:
            seen.setdefault(frame.f_code.co_filename, set()).add(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


def test_what_attention_leaves_out_is_in_the_summary() -> None:
    accelerated = quicksilver.accelerate(tiny.model("llama"), Plan("skips", kv=KVConfig(skip_below=0.9)))
    accelerated(tiny.token_ids(20)[None])
    stats = accelerated.stats
    assert 0.0 < stats.values_read < 1.0
    said = f"attention       {stats.scores_done:.1%} of scores done, {stats.values_read:.1%} of values read"
    assert said in stats.summary()
    accelerated.plan = "dense"
    accelerated(tiny.token_ids(20)[None])
    assert (accelerated.stats.scores_done, accelerated.stats.values_read) == (1.0, 1.0)
    assert "attention" not in accelerated.stats.summary()
