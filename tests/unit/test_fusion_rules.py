"""Each similarity against its formula, on numbers worked out by hand, and chaining against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quicksilver import rules
from quicksilver.core.decisions import PairView
from quicksilver.errors import PlanError
from quicksilver.rules.fusion.chain import chain

EARLIER = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
LATER = torch.tensor([[3.0, 4.0], [0.0, 5.0], [-1.0, -1.0]])  # distances 4, 1, 2.83; cosines 0.6, 1, -1


def view(ordinal: int = 0) -> PairView:
    """Three pairs; the later tokens stand at positions 1, 2 and 3."""
    positions = torch.arange(1, 4)
    return PairView(5, ordinal, EARLIER, LATER, positions, positions)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (rules.L2FusionRule(3.0), [0, 1, 1]),
        (rules.L2FusionRule(4.0), [0, 1, 1]),  # below, not at
        (rules.L2FusionRule((9.0, 0.5)), [1, 1, 1]),
        (rules.CosineFusionRule(0.59), [1, 1, 0]),
        (rules.CosineFusionRule(-0.99), [1, 1, 0]),
        (rules.RandomFusionRule(1.0), [1, 1, 1]),
        (rules.RandomFusionRule(0.0), [0, 0, 0]),
        (rules.ForcedFusionRule((False, True)), [1, 0, 1]),
        (rules.ForcedFusionRule((True, False, False)), [0, 0, 1]),
    ],
    ids=str,
)
def test_rule(rule: rules.FusionRule, expected: list[int]) -> None:
    assert rule.decide(view()).alike.int().tolist() == expected


def test_a_list_of_thresholds_has_one_for_each_fusion_layer() -> None:
    rule = rules.L2FusionRule((9.0, 0.5))
    assert [int(rule.decide(view(ordinal)).alike.sum()) for ordinal in (0, 1)] == [3, 0]


def test_signals_are_accounted_for() -> None:
    asked = {
        type(rule): rule.decide(view()).signal_rows for rule in (rules.L2FusionRule(1.0), rules.CosineFusionRule(1.0))
    }
    assert asked == {rules.L2FusionRule: {"norm": 3}, rules.CosineFusionRule: {"cosine": 3}}
    assert not rules.ForcedFusionRule((True,)).decide(view()).signal_rows


@given(st.data(), st.integers(1, 40), st.integers(2, 7))
def test_chaining_is_greedy_from_the_left(data: st.DataObject, num_rows: int, max_group: int) -> None:
    alike = data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows))
    mass = data.draw(st.lists(st.integers(1, 4), min_size=num_rows, max_size=num_rows))
    alike[0] = False
    expected, size = [], 0
    for like, tokens in zip(alike, mass, strict=True):
        joins = like and size + tokens <= max_group
        size = size + tokens if joins else tokens
        expected.append(joins)
    assert chain(torch.tensor(alike), torch.tensor(mass), max_group).tolist() == expected


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [((4,), 12, (3,)), ((1 / 3,), 12, (3,)), ((0.25, 0.5), 12, (2, 5)), ((1, 0.5), 4, (0, 1)), ((0.1,), 4, (0,))],
)
def test_layers_are_counted_or_are_shares_of_the_depth(
    layers: tuple[int | float, ...], depth: int, expected: tuple[int, ...]
) -> None:
    assert rules.FusionConfig(rules.CosineFusionRule(0.5), layers=layers).after_layers(depth) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [((12,), "after 12 layers saves nothing"), ((3, 2), "must ascend"), ((0.1, 0.11), "must ascend")],
)
def test_layers_that_do_not_fit_the_model_are_refused(layers: tuple[int | float, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        rules.FusionConfig(rules.CosineFusionRule(0.5), layers=layers).after_layers(12)
