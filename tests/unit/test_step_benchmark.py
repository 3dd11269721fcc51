"""The benchmark of a decode step's parts: parts add up to steps, each is there, and nothing stays patched."""

from __future__ import annotations

import pytest
import torch

import quicksilver
from benchmarks import step
from benchmarks.step import PARTS, Watch
from quicksilver.ops import native
from tests import tiny


def test_a_part_is_without_those_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 2.0, 5.0, 9.0])
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(clock))
    watch = Watch()
    inner = watch.timed(lambda: None, "inner")
    watch.timed(inner, "outer")()
    assert dict(watch._seconds) == {"rest": 1.0, "outer": 1.0 + 4.0, "inner": 3.0}


@pytest.mark.skipif(not native.is_available(), reason="this installation has no compiled kernels")
def test_every_step_is_seen_with_its_parts_and_nothing_stays_patched() -> None:
    model = quicksilver.accelerate(tiny.quantized("llama"), step.plan_of(4), ())
    prompt = tiny.token_ids(5)[None]
    before = [vars(owner)[name] for owner, name, _ in step._TIMED]
    model.generate(prompt, max_new_tokens=2)
    for options in step.CASES.values():
        with Watch().over(model) as watch:
            tokens = model.generate(prompt, streamer=watch, max_new_tokens=4, eos_token_id=None, **options)
        assert tokens.shape == (1, 9)
        assert len(watch.steps) == 1 + 4
        assert all(set(each) <= set(PARTS) and min(each.values()) > 0 for each in watch.steps[2:])
    assert {"layers' matrices", "attention", "draw", "loop", "processors"} <= set(watch.steps[-1])
    assert [vars(owner)[name] for owner, name, _ in step._TIMED] == before
    assert torch.equal(tokens[:, :5], prompt)
