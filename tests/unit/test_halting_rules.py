"""Each halting rule, and the gate of shortcuts, against its formula, on numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quicksilver import rules
from quicksilver.core.decisions import Fill, LayerView, ShortcutView
from quicksilver.core.signals import gate_features, shortcut_error

BEFORE = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 1.0], [6.0, 8.0]])
UPDATE = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.3, 0.4], [0.6, 0.8]])  # norms 1, 2, 0.5, 1
PREVIOUS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.4, -0.3], [1.0, 0.0]])  # cosines 1, -1, 0, 0.6
RELATIVE = (1 / 4, 2 / 2, 0.5 / math.hypot(1.3, 1.4), 1 / 11)


def view(layer_idx: int = 1, previous: Tensor | None = PREVIOUS) -> LayerView:
    """Four tokens; the head's entropy is the first coordinate of the state, in bits."""
    return LayerView(layer_idx, BEFORE, BEFORE + UPDATE, previous, torch.arange(4), torch.arange(4), lambda h: h[:, 0])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (rules.DriftRule(1.5), [1, 0, 1, 1]),
        (rules.DriftRule(1.0), [0, 0, 1, 0]),  # below, not at
        (rules.DriftRule((9.0, 0.6, 9.0)), [0, 0, 1, 0]),
        (rules.RelativeDriftRule(0.26), [1, 0, 0, 1]),
        (rules.RelativeDriftRule(RELATIVE[2] + 1e-4), [1, 0, 1, 1]),
        (rules.FixedPointRule(5.0, min_cosine=0.5), [1, 0, 0, 1]),
        (rules.FixedPointRule(0.1, min_cosine=0.5), [0, 0, 0, 1]),
        (rules.FixedPointRule(5.0, min_cosine=-0.5), [1, 0, 1, 1]),
        (rules.EntropyRule(2.0), [0, 1, 1, 0]),
        (rules.EntropyRule(2.0, layers=(0, 2)), [0, 0, 0, 0]),
        (rules.ForcedRule((2, 3)), [1, 0, 1, 0]),
        (rules.RandomRule(1.0), [1, 1, 1, 1]),
        (rules.RandomRule(0.0), [0, 0, 0, 0]),
        (rules.AllRule((rules.DriftRule(1.5), rules.EntropyRule(2.0))), [0, 0, 1, 0]),
    ],
    ids=str,
)
def test_rule(rule: rules.HaltingRule, expected: list[int]) -> None:
    assert rule.decide(view()).halt.tolist() == [bool(x) for x in expected]


def test_a_fixed_point_needs_two_updates() -> None:
    assert not rules.FixedPointRule(9.0, -1.0).decide(view(previous=None)).halt.any()


def test_gate_features_are_what_they_say() -> None:
    features = gate_features(BEFORE, BEFORE + UPDATE, PREVIOUS)
    expected = [
        [math.sqrt(2), 0.0, math.log(1 / 3), 1.0, math.log(4)],
        [0.0, math.sqrt(2), math.log(2 / 4), -1.0, math.log(2)],
        [
            1.3 * math.sqrt(2) / math.hypot(1.3, 1.4),
            1.4 * math.sqrt(2) / math.hypot(1.3, 1.4),
            math.log(0.5 / math.sqrt(2)),
            0.0,
            math.log(math.hypot(1.3, 1.4)),
        ],
        [0.6 * math.sqrt(2), 0.8 * math.sqrt(2), math.log(1 / 10), 0.6, math.log(11)],
    ]
    torch.testing.assert_close(features, torch.tensor(expected))
    first = gate_features(BEFORE, BEFORE + UPDATE, None)
    assert not first[:, 3].any()
    assert torch.equal(first[:, [0, 1, 2, 4]], features[:, [0, 1, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gate_features_are_finite_float32(dtype: torch.dtype) -> None:
    still = torch.zeros(2, 2, dtype=dtype)
    moved = torch.tensor([[3e4, 0.0], [1e-3, 1e-3]], dtype=dtype)
    for before, after in ((still, still), (still, moved), (moved, moved), (moved, still)):
        features = gate_features(before, after, after - before)
        assert features.dtype == torch.float32
        assert features.isfinite().all()


@pytest.mark.parametrize(
    ("gate", "threshold", "expected"),
    [
        ((0, 0, 1, 0, 0, 0), 0.36, [1, 0, 1, 1]),  # relative update norms 1/3, 1/2, 0.354, 0.1
        ((0, 0, 1, 0, 0, 0), 0.34, [1, 0, 0, 1]),
        ((0, 0, 1, 0, 0, math.log(10.0)), 3.4, [1, 0, 0, 1]),  # ten times as many nats
        ((0, 0, 0, 0, 1, 0), 3.0, [0, 1, 1, 0]),  # norms 4, 2, 1.9, 11
        ((0, 0, 0, 1, 0, 0), 0.9, [0, 1, 0, 0]),  # cosines 1, -1, 0, 0.6
        ((0, 0, 0, -1, 0, 0), (9.0, 0.5, 9.0), [1, 0, 0, 0]),  # the second layer's threshold
        ((0, 1, 0, 0, 0, 0), 1.5, [1, 0, 0, 0]),
        ((0, 0, 0, 0, 0, -50.0), 0.0, [0, 0, 0, 0]),
        ((0, 0, 0, 0, 0, 500.0), 1e300, [1, 1, 1, 1]),
    ],
)
def test_fitted_rule(gate: tuple[float, ...], threshold: rules.Threshold, expected: list[int]) -> None:
    seen = replace(view(), gate=torch.tensor(gate, dtype=torch.float32))
    decision = rules.FittedRule(threshold).decide(seen)
    assert decision.halt.tolist() == [bool(x) for x in expected]
    assert decision.signal_rows == {"norm": 12, "cosine": 4}
    assert decision.gate_rows == 4


def test_a_fitted_rule_without_a_gate_halts_nobody_for_nothing() -> None:
    decision = rules.FittedRule(1e9).decide(view())
    assert not decision.halt.any()
    assert (decision.signal_rows, decision.gate_rows) == ({}, 0)


def test_gates_of_combined_rules_are_accounted_for() -> None:
    of_norm = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    both = rules.AllRule((rules.DriftRule(1.5), rules.FittedRule(3.0)))
    decision = both.decide(replace(view(), gate=of_norm))
    assert decision.halt.tolist() == [False, False, True, False]
    assert decision.gate_rows == 3
    assert both.reads_previous_update
    assert both.reads_gates
    assert not rules.AllRule((rules.DriftRule(1.0),)).reads_gates


def test_what_a_rule_is_never_asked() -> None:
    assert not rules.EntropyRule(1.0, layers=(2,)).may_halt(1)
    assert rules.EntropyRule(1.0, layers=(2,)).may_halt(2)
    assert not rules.AllRule((rules.DriftRule(1.0), rules.ForcedRule((3,)))).may_halt(1)


def test_a_depth_is_reached_once_unless_rows_change_places_or_another_rule_must_agree() -> None:
    forced = rules.ForcedRule((6, 12, 1))
    assert [i for i in range(12) if forced.may_halt(i)] == list(range(12))
    assert [i for i in range(2, 12) if forced.may_halt(i, 2)] == [2, 5, 11]  # depth 1 is reached by then
    both = rules.AllRule((rules.DriftRule(1.0), forced))
    assert [i for i in range(2, 12) if both.may_halt(i, 2)] == list(range(2, 12))


def test_signals_are_accounted_for() -> None:
    assert rules.DriftRule(1.0).decide(view()).signal_rows == {"norm": 4}
    assert rules.FixedPointRule(1.0).decide(view()).signal_rows == {"norm": 8, "cosine": 4}
    both = rules.AllRule((rules.DriftRule(1.5), rules.EntropyRule(2.0)))
    assert both.decide(view()).signal_rows == {"norm": 4, "head": 3}
    assert rules.ForcedRule((2,)).decide(view()).signal_rows == {}


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (rules.DropFill(), Fill.NONE),
        (rules.ZeroFill(), Fill.ZERO),
        (rules.PropagateFill(), Fill.PROJECT),
    ],
)
def test_fills(fill: rules.FillRule, expected: Fill) -> None:
    assert fill.ask(3) is expected


def test_a_gate_is_asked_about_unprotected_tokens_alone() -> None:
    """Worked out by hand: log error = x[0] + 2 log |state| - 1, states of norms 1, e and 1."""
    gate = torch.tensor([1.0, 0.0, 2.0, -1.0])
    normed = torch.tensor([[0.5, 9.0], [0.5, 9.0], [1.5, 9.0]])
    state = torch.tensor([[1.0, 0.0], [0.0, math.e], [0.6, 0.8]])
    torch.testing.assert_close(shortcut_error(gate, normed, state), torch.tensor([-0.5, 1.5, 0.5]))
    everyone = rules.Shortcut(0, "mlp", math.exp(1.0)).decide(gate, ShortcutView(normed, state, None))
    assert (everyone.take.tolist(), everyone.gate_rows) == ([True, False, True], 3)
    protected = torch.tensor([True, False, False])
    some = rules.Shortcut(0, "mlp", math.exp(1.0)).decide(gate, ShortcutView(normed, state, protected))
    assert (some.take.tolist(), some.gate_rows) == ([False, False, True], 2)
    ungated = rules.Shortcut(0, "mlp").decide(None, ShortcutView(normed, state, protected))
    assert (ungated.take.tolist(), ungated.gate_rows) == ([False, True, True], 0)


def test_a_gate_survives_a_state_of_zeros_and_huge_errors() -> None:
    gate, normed = torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.zeros(2, 2)
    view = ShortcutView(normed, torch.tensor([[0.0, 0.0], [1e30, 0.0]]), None)
    assert rules.Shortcut(0, "mlp", 1.0).decide(gate, view).take.tolist() == [True, False]
    assert rules.Shortcut(0, "mlp", 1e299).decide(gate * 50.0, view).take.tolist() == [True, False]
