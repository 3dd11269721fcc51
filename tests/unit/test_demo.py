"""The demonstration's picture: the plan whose depths it shows stops some tokens."""

from __future__ import annotations

import quicksilver
from quicksilver.measure import demo
from quicksilver.plan import Plan
from quicksilver.rules import RandomRule
from tests import tiny
from tests.engines import halting_plan

IDS = tiny.token_ids(40).tolist()


def share_stopped(depths: list[int]) -> float:
    return sum(depth < tiny.NUM_LAYERS for depth in depths) / len(depths)


def test_a_plan_that_stops_tokens_is_shown_itself() -> None:
    first, model = halting_plan(RandomRule(0.3)), quicksilver.accelerate(tiny.model("gpt2"))
    plan, depths = demo.stopping(model, first, IDS)
    assert plan is first
    assert depths == demo.token_depths(model, first, IDS, False)
    assert share_stopped(depths) >= demo.STOPPED


def test_for_one_that_stops_none_a_looser_one_is_shown() -> None:
    model = quicksilver.accelerate(tiny.model("gpt2"))
    plan, depths = demo.stopping(model, Plan.preset("paper"), IDS)
    assert share_stopped(demo.token_depths(model, Plan.preset("paper"), IDS, False)) == 0.0
    assert plan.name.startswith("relative, threshold ")
    assert share_stopped(depths) >= demo.STOPPED


def test_the_looser_ones_differ_from_the_preset_by_their_threshold_alone() -> None:
    plan, _ = demo.stopping(quicksilver.accelerate(tiny.model("gpt2")), Plan.dense(), IDS)
    data, preset = (each.to_dict() for each in (plan, Plan.preset("relative")))
    assert data["halting"]["rule"].pop("threshold") > preset["halting"]["rule"].pop("threshold")
    assert (data["halting"], data["kv"]) == (preset["halting"], preset["kv"])
