"""Candidates are scored as `eval` scores plans, in any order, and with nothing left over from the one before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quicksilver
from quicksilver.calibrate.samples import sample_windows
from quicksilver.calibrate.scoring import Budget, Scorer
from quicksilver.calibrate.splits import Part
from quicksilver.measure.report import evaluate
from quicksilver.measure.windows import WindowConfig, WindowedText, slide
from quicksilver.plan import Plan
from quicksilver.rules import ForcedRule, RandomFusionRule, RandomRule, Shortcut, UniformBitsRule
from quicksilver.weights.linear import keeping_expanded
from tests import tiny
from tests.engines import fusion_plan, halting_plan, precision_plan, shortcut_plan, skipping_plan, with_maps

IDS = torch.cat(sample_windows(quicksilver.accelerate(tiny.model("llama")), 240)).tolist()  # what the model says itself
PLAIN = WindowConfig(32, 16, bos_id=0)
PROMPTS = WindowConfig(32, 10, bos_id=0, prompt=20)
TIMES = ("seconds", "tokens_per_second", "speedup")
PLANS = {
    "dense": Plan.dense(),
    "halting": halting_plan(RandomRule(0.3)),
    "mapped": with_maps(halting_plan(RandomRule(0.3)), tiny.fitted(outputs=(0, 1, 2))).renamed("mapped"),
    "shortcuts": shortcut_plan(Shortcut(1, "mlp"), Shortcut(2, "attention", 1.0)),
    "skipping": skipping_plan(0.8),
    "fusion": fusion_plan(RandomFusionRule(0.5), scope="prompt"),
    "bits": precision_plan(UniformBitsRule(2)),
}


def text(window_config: WindowConfig) -> WindowedText:
    return WindowedText("random ids", tuple(slide(IDS, window_config)), scored_bytes=4 * len(IDS))


def part(window_config: WindowConfig) -> Part:
    return Part(text(window_config), (("random ids", len(text(window_config).windows)),))


def timeless(value: Any) -> Any:
    """Return a row without what a clock said, and without what `eval` does not know of."""
    if not isinstance(value, dict):
        return value
    return {
        key: timeless(each)
        for key, each in value.items()
        if key not in TIMES and not key.endswith(("_8bit", "_by_text", "settings"))
    }


def models(quantized: bool) -> tuple[Any, Any]:
    model = quicksilver.accelerate(tiny.model("llama"))
    return model, quicksilver.accelerate(tiny.quantized("llama")) if quantized else model


@pytest.mark.parametrize("window_config", [PLAIN, PROMPTS], ids=["windows", "prompts"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_figures_are_those_of_eval(window_config: WindowConfig, interleaved: bool) -> None:
    model, runner = models(quantized=False)
    plans = [plan for name, plan in PLANS.items() if name != "bits"]
    scorer = Scorer(model, runner, part(window_config), window_config, "tiny", interleaved)
    wanted = evaluate(model, plans, text(window_config), window_config, "score", "tiny")
    for plan, row in zip(plans, wanted, strict=True):
        assert timeless(scorer.score(plan)) == timeless(row)


def test_figures_of_quantized_weights_are_those_of_eval() -> None:
    model, runner = models(quantized=True)
    (wanted,) = evaluate(model, [PLANS["bits"]], text(PLAIN), PLAIN, "score", "tiny", quantized=runner)
    scorer = Scorer(model, runner, part(PLAIN), PLAIN, "tiny")
    row = scorer.score(PLANS["bits"])
    assert row is not None
    assert timeless(row) == timeless(wanted)
    delta = row["delta"]
    assert delta["bitops_reduction_8bit"] < delta["bitops_reduction"]  # against 8 bits, not against 32
    eight = scorer.score(precision_plan(UniformBitsRule(8)))
    assert eight is not None
    assert eight["delta"]["bitops_reduction_8bit"] == pytest.approx(0.0, abs=1e-9)
    assert eight["delta"]["weight_bytes_reduction_8bit"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("interleaved", [False, True])
def test_nothing_is_left_over_from_one_candidate_to_the_next(interleaved: bool) -> None:
    model, runner = models(quantized=True)
    scorer = Scorer(model, runner, part(PROMPTS), PROMPTS, "tiny", interleaved)
    cost = scorer.dense_cost(runner.adapter)
    with keeping_expanded(runner.model):
        first = [timeless(scorer.score(plan)) for plan in PLANS.values()]
        backwards = [timeless(scorer.score(plan)) for plan in reversed(PLANS.values())]
    assert backwards == first[::-1]
    assert scorer.dense_cost(runner.adapter) == cost
    assert part(PROMPTS).tokens == first[0]["tokens_scored"]


def test_clocks_do_not_go_on_with_the_candidates() -> None:
    """The dense side's seconds are of the one run that was timed, and of the head on each occasion."""
    model, runner = models(quantized=False)
    scorer = Scorer(model, runner, part(PROMPTS), PROMPTS, "tiny")
    before = [(fed.clock.seconds, fed.prompt_clock.seconds) for fed in scorer._fed]
    for _ in range(2):
        scorer.score(PLANS["halting"])
    assert [(fed.clock.seconds, fed.prompt_clock.seconds) for fed in scorer._fed] == before


def test_the_hopeless_are_given_up_early_and_leave_no_trace() -> None:
    model, runner = models(quantized=False)
    scorer = Scorer(model, runner, part(PLAIN), PLAIN, "tiny")
    before, counted = timeless(scorer.score(PLANS["halting"])), []
    poor = halting_plan(ForcedRule((1,)))
    assert scorer.score(poor, Budget(1e-4, "nll"), lambda: counted.append(None)) is None
    windows = len(text(PLAIN).windows)
    assert len(counted) in (windows // 4, windows // 2)
    assert scorer.score(poor, Budget(100.0, "nll")) is not None
    assert timeless(scorer.score(PLANS["halting"], Budget(100.0, "ppl"))) is not None
    assert timeless(scorer.score(PLANS["halting"])) == before
