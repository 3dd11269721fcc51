"""Fusion equals the dense masked oracle, keeps every token's mass, and costs what its trace says."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
import torch

from quicksilver import rules
from quicksilver.core.decisions import PairView
from quicksilver.plan import Plan
from tests import oracle, tiny, tolerances
from tests.engines import FILLS, decoder, fusion_plan, run_whole

WEIGHTS = get_args(rules.FusionWeights)
LENGTH = 40
ATOL = tolerances.LOGITS[torch.float32]
DECIDED = (
    rules.L2FusionRule((23.0, 28.0)),
    rules.CosineFusionRule(0.1),
    rules.RandomFusionRule(0.5, seed=3),
)


def check(model, ids, plan: Plan, halts=oracle.never, alike=None) -> oracle.OracleRun:
    config = plan.fusion
    assert config is not None
    after = config.after_layers(4)
    joins = config.rule.joins if isinstance(config.rule, rules.ForcedFusionRule) else ()
    alike = alike or (lambda layer_idx, hidden, earlier, later: joins[later % len(joins)])
    expected = oracle.run(
        model, ids, plan.kv.fill, halts, oracle.Fusion(after, config.max_group, config.weights, alike)
    )
    run = run_whole(decoder(model, plan), ids)
    assert torch.equal(run.trace.depths[0], expected.depths)
    assert [layer.attended for layer in run.trace.layers] == expected.attended
    formed = [sorted(layer.group_sizes.elements()) for layer in run.trace.layers]
    assert formed == expected.sizes
    torch.testing.assert_close(run.logits, expected.logits, atol=ATOL, rtol=0)
    for layer_idx in range(4):
        entries = run.cache.entries(layer_idx, 0)
        masses = torch.ones_like(entries.positions) if entries.masses is None else entries.masses
        assert torch.equal(masses.long(), expected.masses[layer_idx][entries.positions.long()])
    return expected


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("layers", [(1,), (2,), (1, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MORE])
def test_forced_random_groups(family: str, layers: tuple[int, ...], weights: rules.FusionWeights) -> None:
    ids, generator = tiny.token_ids(LENGTH, len(layers)), torch.Generator().manual_seed(len(layers))
    joins = tuple((torch.rand(LENGTH, generator=generator) < 0.6).tolist())
    plan = fusion_plan(rules.ForcedFusionRule(joins), layers=layers, weights=weights, max_group=4)
    expected = check(tiny.model(family), ids, plan)
    assert sum(len(sizes) for sizes in expected.sizes) > 5


@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_forced_random_groups_with_forced_random_depths(
    family: str, weights: rules.FusionWeights, fill: rules.FillRule
) -> None:
    ids, generator = tiny.token_ids(LENGTH, 5), torch.Generator().manual_seed(7)
    joins = tuple((torch.rand(LENGTH, generator=generator) < 0.7).tolist())
    depths = torch.randint(1, 6, (LENGTH,), generator=generator)
    rule, halting = rules.ForcedFusionRule(joins), rules.ForcedRule(tuple(depths.tolist()))
    plan = fusion_plan(rule, halting, fill, layers=(1, 2), weights=weights)
    check(tiny.model(family), ids, plan, lambda layer_idx, *_: depths <= layer_idx + 1)


@pytest.mark.parametrize(("rule", "weights"), [*product(DECIDED, WEIGHTS)], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_decided_groups(family: str, rule: rules.FusionRule, weights: rules.FusionWeights) -> None:
    ids = tiny.token_ids(LENGTH)

    def alike(layer_idx, hidden, earlier, later):
        view = PairView(
            layer_idx, layer_idx - 1, hidden[[earlier]], hidden[[later]], torch.tensor([later]), ids[[later]]
        )
        return bool(rule.decide(view).alike)

    expected = check(tiny.model(family), ids, fusion_plan(rule, weights=weights, layers=(2, 3)), alike=alike)
    assert 2 <= sum(len(sizes) for sizes in expected.sizes) <= LENGTH // 2


def test_fusing_nothing_is_dense_bit_for_bit() -> None:
    for family, weights in product(tiny.FAMILIES, WEIGHTS):
        ids = tiny.token_ids(20)
        dense = run_whole(decoder(tiny.model(family), Plan.dense()), ids)
        run = run_whole(decoder(tiny.model(family), fusion_plan(rules.RandomFusionRule(0.0), weights=weights)), ids)
        assert torch.equal(run.logits, dense.logits)
        assert run.trace.fused_fraction == 0.0


def test_protected_tokens_never_fuse() -> None:
    ids = tiny.token_ids(20)
    ids[9] = 7
    plan = fusion_plan(rules.RandomFusionRule(1.0), protect_first=3, protect_special=True, max_group=99)
    run = run_whole(decoder(tiny.model("llama"), plan, special_ids=[7]), ids)
    entries = run.cache.entries(3, 0)
    assert entries.positions.tolist() == [0, 1, 2, 8, 9, 19]
    assert entries.masses is not None
    assert entries.masses.tolist() == [1, 1, 1, 6, 1, 10]
