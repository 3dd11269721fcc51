"""What units of work are worth: prices ascend, thresholds follow them, and what was disturbed is put back."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quicksilver.calibrate.bits import MapScores, collect_scores, unprotected
from quicksilver.calibrate.observe import PROTECTED, layer_states, run
from quicksilver.calibrate.outputs import divergence
from quicksilver.calibrate.sensitivity import (
    THRESHOLDS,
    Probe,
    attention_prices,
    map_weights,
    threshold_at_price,
)
from quicksilver.families.registry import adapt
from quicksilver.plan import Plan
from quicksilver.rules import ChannelBitsRule, PrecisionConfig
from tests import tiny, tolerances
from tests.engines import skipping_plan

WINDOWS = [tiny.token_ids(60, seed=seed) for seed in range(3)]


def scores_of(model: Any) -> list[MapScores]:
    adapter, rule = adapt(model), ChannelBitsRule(target=8.0, bits=(8, 0))
    return collect_scores(rule, adapter, unprotected(adapter, PrecisionConfig(rule), WINDOWS, ()))


def hooks_of(model: Any) -> list[str]:
    return [name for name, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_prices_of_attention_ascend(family: str) -> None:
    probe, counted = Probe(adapt(tiny.model(family)), WINDOWS), []
    prices = attention_prices(probe, lambda: counted.append(None))
    assert [threshold for threshold, _ in prices.points] == list(THRESHOLDS)
    assert len(counted) == len(THRESHOLDS) + tiny.NUM_LAYERS
    assert all(before <= after for (_, before), (_, after) in pairwise(prices.points))
    assert prices.points[-1][1] > prices.points[0][1] >= 0.0
    assert len(prices.layers) == tiny.NUM_LAYERS
    cheap, dear = prices.thresholds(prices.points[0][1] / 2), prices.thresholds(prices.points[-1][1] * 1e6)
    assert all(0.0 <= low <= high == THRESHOLDS[-1] for low, high in zip(cheap, dear, strict=True))


def test_a_probe_measures_divergence_from_the_dense_model() -> None:
    adapter = adapt(tiny.model("llama"))
    probe, plan = Probe(adapter, WINDOWS), skipping_plan(1.0)
    assert probe.nats() == probe.nats(Plan.dense()) == 0.0
    each = [
        divergence(adapter, layer_states(adapter, window)[-1], run(adapter, window, plan))[PROTECTED:]
        for window in WINDOWS
    ]
    assert probe.nats(plan) == pytest.approx(float(torch.cat(each).mean()), rel=tolerances.LOSS_SHARE)
    assert probe.macs(plan) < probe.macs(Plan.dense())


def test_windows_of_attention_sinks_do_not_count() -> None:
    adapter, plan = adapt(tiny.model("llama")), skipping_plan(1.0)
    short = [tiny.token_ids(2), tiny.token_ids(PROTECTED)]
    assert Probe(adapter, [*WINDOWS, *short]).nats(plan) == Probe(adapter, WINDOWS).nats(plan)


@st.composite
def prices(draw: st.DrawFn) -> list[tuple[float, float]]:
    """Return thresholds and their prices, both ascending."""
    of_thresholds = sorted(draw(st.lists(st.floats(0.0, 1.0), min_size=7, max_size=7)))
    return list(zip(THRESHOLDS, of_thresholds, strict=True))


@given(prices(), st.floats(0.0, 1.5), st.floats(0.0, 1.5))
def test_thresholds_grow_with_the_price(known: list[tuple[float, float]], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0.0 <= threshold_at_price(known, low) <= threshold_at_price(known, high) <= THRESHOLDS[-1]


def test_a_threshold_lies_between_the_points_whose_prices_enclose_it() -> None:
    known = [(0.1, 1.0), (0.2, 1.0), (0.5, 3.0), (1.0, 7.0)]
    for nats_per_work, threshold in (
        (0.0, 0.0),
        (0.5, 0.05),
        (1.0, 0.2),
        (2.0, 0.35),
        (3.0, 0.5),
        (5.0, 0.75),
        (7.0, 1.0),
    ):
        assert threshold_at_price(known, nats_per_work) == pytest.approx(threshold)
    assert threshold_at_price(known, 100.0) == 1.0
    assert threshold_at_price([], 1.0) == 0.0


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_weights_of_maps_are_positive_and_leave_no_hook(family: str) -> None:
    model = tiny.quantized(family)
    scores, before, counted = scores_of(model), hooks_of(model), []
    probe = Probe(adapt(model), WINDOWS)
    weights = map_weights(probe, scores, on_map=lambda: counted.append(None))
    assert len(weights) == len(counted) == len(scores)
    assert all(weight > 0.0 for weight in weights)
    assert hooks_of(model) == before
    assert probe.nats() == 0.0


def test_an_error_leaves_no_hook_either() -> None:
    model = tiny.quantized("llama")
    probe, scores, before = Probe(adapt(model), WINDOWS), scores_of(model), hooks_of(model)
    calls: list[None] = []

    class Spoilt:
        adapter, num_rows = probe.adapter, probe.num_rows

        def nats(self) -> float:
            assert hooks_of(model) != before
            calls.append(None)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
            return probe.nats()

    with pytest.raises(RuntimeError, match="out of memory"):
        map_weights(Spoilt(), scores)  # type: ignore[arg-type]
    assert hooks_of(model) == before
    assert probe.nats() == 0.0


def test_a_map_that_matters_more_weighs_more() -> None:
    """A unit of relative error of a map counts as much as its share of the state: doubled outputs, heavier map."""
    light, heavy = tiny.quantized("llama"), copy.deepcopy(tiny.quantized("llama"))
    o_proj = heavy.model.layers[2].self_attn.o_proj
    o_proj.register_forward_hook(lambda module, args, output: 4.0 * output)
    names = [name for name, m in light.model.layers[2].named_modules() if m.__class__.__name__ == "AnyPrecisionLinear"]
    i = 2 * len(names) + names.index("self_attn.o_proj")
    weights = [map_weights(Probe(adapt(model), WINDOWS), scores_of(model))[i] for model in (light, heavy)]
    assert weights[1] > 2.0 * weights[0]
