"""Ragged execution equals the dense masked oracle, under forced and under decided halting."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch

from quicksilver import rules
from quicksilver.core.decisions import LayerView
from tests import oracle, tiny, tolerances
from tests.engines import decoder, halting_plan, run_whole
from tests.oracle_parts import head_entropy

FILLS = (rules.DropFill(), rules.ZeroFill(), rules.PropagateFill())
DECIDED = (
    rules.DriftRule(14.0),
    rules.RelativeDriftRule((0.95, 0.75, 0.65, 0.6)),
    rules.FixedPointRule(0.75, min_cosine=-0.05),
    rules.EntropyRule(6.9),
    rules.RandomRule(0.3, seed=5),
    rules.AllRule((rules.RelativeDriftRule(0.75), rules.EntropyRule(7.0))),
)


SCALED = ("gemma2", "gemma3_text", "olmo2", "granite")
"""Families whose states or logits are larger or smaller than the thresholds above are meant for."""


def check(model, ids, rule, fill, halts) -> torch.Tensor:
    run = run_whole(decoder(model, halting_plan(rule, fill)), ids)
    expected = oracle.run(model, ids, fill, halts)
    assert torch.equal(run.trace.depths[0], expected.depths)
    assert [layer.attended for layer in run.trace.layers] == expected.attended
    torch.testing.assert_close(run.logits, expected.logits, atol=tolerances.LOGITS[torch.float32], rtol=0)
    return expected.depths


@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MORE])
@pytest.mark.parametrize("seed", range(3))
def test_forced_random_depths(family: str, fill: rules.FillRule, seed: int) -> None:
    model, ids = tiny.model(family), tiny.token_ids(40, seed)
    depths = torch.randint(1, 5, (40,), generator=torch.Generator().manual_seed(seed))

    def halts(layer_idx, before, after, previous):
        return depths <= layer_idx + 1

    ran = check(model, ids, rules.ForcedRule(tuple(depths.tolist())), fill, halts)
    assert torch.equal(ran, depths)


@pytest.mark.parametrize(("family", "fill"), [*product(tiny.FAMILIES, (FILLS[0], FILLS[2]))], ids=str)
@pytest.mark.parametrize("rule", DECIDED, ids=lambda r: type(r).__name__)
def test_decided_halting(family: str, fill: rules.FillRule, rule: rules.HaltingRule) -> None:
    model, ids = tiny.model(family), tiny.token_ids(48)
    entropy = partial(head_entropy, model)

    def halts(layer_idx, before, after, previous):
        return rule.decide(LayerView(layer_idx, before, after, previous, torch.arange(48), ids, entropy)).halt

    check(model, ids, rule, fill, halts)


@pytest.mark.parametrize("rule", DECIDED, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in SCALED])
def test_the_rules_above_halt_some_tokens_but_not_all(family: str, rule: rules.HaltingRule) -> None:
    trace = run_whole(decoder(tiny.model(family), halting_plan(rule)), tiny.token_ids(48)).trace
    assert 1.0 < trace.mean_depth < 4.0


def test_the_oracle_without_halting_is_transformers() -> None:
    for name in (*tiny.FAMILIES, *tiny.VARIANTS):
        model, ids = tiny.model(name), tiny.token_ids(16)
        never = oracle.run(model, ids, rules.DropFill(), lambda *_: torch.zeros(16, dtype=torch.bool))
        with torch.no_grad():
            expected = model(ids[None]).logits[0]
        torch.testing.assert_close(never.logits, expected, atol=tolerances.LOGITS[torch.float32], rtol=0)
