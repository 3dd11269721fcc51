"""Bits rules: thresholds to bits, what is refused, and thresholds fitted to what they were asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quicksilver.calibrate.bits import fit
from quicksilver.calibrate.histograms import histogram, quantiles, share_above
from quicksilver.calibrate.samples import sample_windows
from quicksilver.core.signals import graded
from quicksilver.errors import InputError, PlanError
from quicksilver.families.registry import adapt
from quicksilver.loading.load import accelerate
from quicksilver.plan import Plan
from quicksilver.rules import (
    ChannelBitsRule,
    DriftRule,
    EntropyBitsRule,
    HaltingConfig,
    PrecisionConfig,
    UniformBitsRule,
)
from tests import tiny
from tests.engines import decoder, precision_plan, run_whole
from tests.strategies import precise_plans

WINDOWS = [tiny.token_ids(60, seed=seed) for seed in range(6)]


def test_a_score_gets_the_first_width_whose_threshold_it_reaches() -> None:
    scores = torch.tensor([9.0, 4.0, 3.999, 1.0, 0.999, 0.5, 0.0])
    assert graded(scores, (4.0, 1.0, 0.5), (8, 4, 2, 0)).tolist() == [8, 8, 4, 4, 2, 2, 0]
    assert graded(scores, (1.0, 1.0, 1.0), (8, 4, 2, 0)).tolist() == [8, 8, 8, 8, 0, 0, 0]


def test_thresholds_are_not_rounded_to_the_scores_type() -> None:
    """In bfloat16 1.002 would be 1.0, which a score of 1.0 reaches."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        scores = torch.tensor([1.0078125, 1.0], dtype=dtype)
        assert graded(scores, (1.0002,), (8, 4)).tolist() == [8, 4]
    assert graded(torch.tensor([1.0], dtype=torch.float64), (1.0 + 1e-12,), (8, 4)).tolist() == [4]


@given(precise_plans)
def test_plans_that_choose_widths_survive_json(plan: Plan) -> None:
    again = Plan.from_dict(plan.to_dict(), tensors=plan.tensors)
    assert again == plan
    assert again.hash == plan.hash


CHANNEL = {"type": "channel", "thresholds": [3.0, 2.0, 1.0, 0.5]}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"type": "uniform", "bits": 9}, "bits must be one of 2, 4, 6, 8, got 9"),
        ({"type": "uniform", "bits": 4.0}, "bits must be"),
        ({"type": "uniform"}, "bits"),
        ({"type": "best"}, "precision.rule.type must be one of channel, entropy, .*uniform, got 'best'"),
        ({"type": "channel"}, "give thresholds, or a target"),
        ({**CHANNEL, "thresholds": [3, 2, 1]}, "thresholds must be 4 numbers"),
        ({**CHANNEL, "thresholds": [1, 2, 3, 4]}, "thresholds must descend"),
        ({**CHANNEL, "thresholds": [3, 2, 1, float("nan")]}, "thresholds must be 4 numbers"),
        ({**CHANNEL, "thresholds": "many"}, "thresholds must be 4 numbers"),
        ({**CHANNEL, "thresholds": []}, "thresholds must be 4 numbers"),
        ({**CHANNEL, "thresholds": [[3, 2, 1, 0], [3, 2, 1]]}, "thresholds must be 4 numbers"),
        ({**CHANNEL, "bits": [8, 8, 4, 2, 0]}, "bits must descend"),
        ({**CHANNEL, "bits": [8]}, "bits must be two or more"),
        ({**CHANNEL, "score": "weighted"}, "unknown key 'score'"),
        ({"type": "channel", "target": 9.0}, "mean of 9.0 bits cannot be had"),
        ({"type": "channel", "target": [0.5, 0.5]}, "one share for each of"),
        ({"type": "channel", "target": [0.5, 0.4, 0.3, 0.1, 0.1]}, "must add up to 1"),
        (
            {"type": "entropy", "thresholds": [2, 1], "bits": [8, 4, 0]},
            "each of bits must be one of 2, 4, 6, 8, got 0",
        ),
        ({"type": "entropy", "thresholds": [2, 1], "layer": 0}, "layer must be at least 1"),
        ({"type": "entropy", "thresholds": [2, 1], "over": "body"}, "over must be head or hidden"),
        ({"type": "entropy", "target": 5.0}, "one share for each of"),
    ],
)
def test_malformed_rules_are_refused_by_name(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_dict({"version": 2, "precision": {"rule": rule}}, "mine.json")
    assert str(caught.value).startswith("mine.json: precision")


def test_a_plan_must_fit_the_model() -> None:
    quantized, plain = tiny.quantized("llama"), tiny.model("llama")
    for plan, model, message in (
        (precision_plan(UniformBitsRule(4)), plain, "weights that are not quantized"),
        (precision_plan(ChannelBitsRule(target=5.0)), quantized, "still to be fitted"),
        (precision_plan(ChannelBitsRule(((4.0,) * 4,) * 24)), quantized, "24 sets of thresholds, the model has 4 x 7"),
        (precision_plan(EntropyBitsRule((2.0, 1.0), layer=4)), quantized, "save nothing, the model has 4"),
    ):
        with pytest.raises(PlanError, match=message):
            decoder(model, plan)
    with pytest.raises(PlanError, match="fitted to any-precision weights"):
        fit(adapt(plain), Plan.preset("channel-5bit"), WINDOWS)


LATE = EntropyBitsRule(target=(0.5, 0.3, 0.2), layer=4)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (precision_plan(LATE), "save nothing, the model has 4"),
        (precision_plan(EntropyBitsRule(target=(0.5, 0.3, 0.2), layer=9)), "save nothing, the model has 4"),
        (
            precision_plan(
                ChannelBitsRule(target=5.0), halting=HaltingConfig(DriftRule(0.1), min_layer=9, protect_first=0)
            ),
            "min_layer",
        ),
    ],
)
def test_nothing_is_fitted_that_could_not_run(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=f"plan 'test': .*{message}"):
        fit(adapt(tiny.quantized("llama")), plan, WINDOWS, lambda: pytest.fail("a window was run"))


@pytest.mark.parametrize("rule", [ChannelBitsRule(target=5.0), EntropyBitsRule(target=(0.5, 0.3, 0.2))])
def test_there_must_be_something_to_fit_to(rule: Any) -> None:
    adapter, plan = adapt(tiny.quantized("llama")), Plan("mine", precision=PrecisionConfig(rule, protect_first=4))
    with pytest.raises(InputError, match="plan 'mine': nothing to fit bits to: no calibration text"):
        fit(adapter, plan, [])
    with pytest.raises(InputError, match="holds no tokens but protected ones"):
        fit(adapter, plan, [tiny.token_ids(4), tiny.token_ids(1)])
    assert not fit(adapter, plan, [tiny.token_ids(4), tiny.token_ids(5)]).is_recipe


@pytest.mark.parametrize(
    "rule",
    [
        ChannelBitsRule(target=5.0),
        ChannelBitsRule(target=(0.3, 0.3, 0.2, 0.1, 0.1)),
        EntropyBitsRule(target=(0.5, 0.3, 0.2)),
    ],
    ids=["mean", "shares", "entropy"],
)
def test_protected_tokens_do_not_count(rule: Any) -> None:
    """Half of the tokens read everything; the others get what was asked for, however unlike them those are."""
    special = 7
    windows = [window.clone() for window in WINDOWS]
    for window in windows:
        window[::2] = special
    model = copy.deepcopy(tiny.quantized("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[special] = 100.0 * torch.eye(32)[3]  # one channel is all they have
    recipe = Plan("mine", precision=PrecisionConfig(rule, protect_first=0, protect_special=True))
    plan = fit(adapt(model), recipe, windows, special_ids=[special])
    traces = [run_whole(decoder(model, plan, special_ids=[special]), window).trace for window in windows]
    first = 2 if isinstance(rule, EntropyBitsRule) else 0
    counts = [layer.macs_by_bits for trace in traces for layer in trace.layers[first:]]
    macs = [sum(of_bits) for of_bits in zip(*counts, strict=True)]
    shares = [2 * count / sum(macs) for count in macs]
    shares[8] -= 1.0
    if isinstance(rule.target, float):
        assert abs(sum(bits * share for bits, share in enumerate(shares)) - rule.target) < 0.1
    else:
        assert [shares[bits] for bits in rule.bits] == pytest.approx(rule.target, abs=0.03)


@settings(max_examples=30)
@given(st.integers(0, 99), st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5))
def test_quantiles_of_a_histogram_are_those_of_the_scores(seed: int, parts: list[float]) -> None:
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(seed)).exp()
    shares = [part / sum(parts) for part in parts]
    counts, above = histogram(scores), 0.0
    for limit, share in zip(quantiles(counts, shares), shares, strict=False):
        above += share
        assert abs(float((scores >= limit).float().mean()) - above) < 0.01
        assert abs(share_above(counts, limit) - above) < 1e-6


@pytest.mark.parametrize("family", tiny.LAYOUTS)
@pytest.mark.parametrize("target", [7.0, 5.0, 3.5, (0.3, 0.3, 0.2, 0.1, 0.1)])
def test_channel_thresholds_give_what_was_asked_for(family: str, target: Any) -> None:
    model = tiny.quantized(family)
    plan = fit(adapt(model), precision_plan(ChannelBitsRule(target=target)), WINDOWS)
    assert not plan.is_recipe
    macs = [0] * 9
    for window in WINDOWS:
        trace = run_whole(decoder(model, plan), window).trace
        macs = [a + b for a, b in zip(macs, trace.macs_by_bits, strict=True)]
    shares = [count / sum(macs) for count in macs]
    if isinstance(target, float):
        assert abs(sum(bits * share for bits, share in enumerate(shares)) - target) < 0.15
    else:
        assert [shares[bits] for bits in (8, 6, 4, 2, 0)] == pytest.approx(target, abs=0.03)


def test_entropy_thresholds_give_the_shares_asked_for() -> None:
    model, target = tiny.quantized("llama"), (0.3, 0.5, 0.2)
    plan = fit(adapt(model), precision_plan(EntropyBitsRule(target=target)), WINDOWS)
    assert not plan.is_recipe
    macs = [0] * 9
    for window in WINDOWS:
        trace = run_whole(decoder(model, plan), window).trace
        deeper = (layer.macs_by_bits for layer in trace.layers[2:])
        macs = [sum(counts) for counts in zip(macs, *deeper, strict=True)]
    assert [macs[bits] / sum(macs) for bits in (8, 4, 2)] == pytest.approx(target, abs=0.03)


def test_fitting_leaves_everything_else_alone() -> None:
    model = tiny.quantized("llama")
    fitted = precision_plan(UniformBitsRule(4))
    assert fit(adapt(model), fitted, WINDOWS) is fitted
    assert fit(adapt(model), Plan.dense(), WINDOWS) == Plan.dense()
    recipe = Plan.preset("channel-5bit")
    plan = fit(adapt(model), recipe, WINDOWS)
    assert plan.name == recipe.name
    assert plan.precision.rule.target == recipe.precision.rule.target
    assert plan == fit(adapt(model), recipe, WINDOWS)
    hooks = [module for module in model.modules() if module._forward_hooks]
    assert not hooks


def test_text_sampled_from_the_model_is_the_same_for_the_same_seed() -> None:
    model = accelerate(tiny.model("llama"))
    one, same, other = (sample_windows(model, 100, seed) for seed in (1, 1, 2))
    assert sum(map(len, one)) >= 100
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
