"""Ragged execution equals the dense masked oracle, under forced and under decided halting."""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise, product

import pytest
import torch

from quicksilver import rules
from quicksilver.core.decisions import LayerView
from tests import oracle, tiny, tolerances
from tests.engines import FILLS, decoder, halting_plan, run_whole
from tests.oracle_parts import head_entropy

DECIDED = ("drift", "relative", "fixed_point", "entropy", "random", "all")
LENGTH = 48


@cache
def telling(family: str) -> dict[str, rules.HaltingRule]:
    """Return rules by name, with thresholds in the middle of what a family's dense model gives them.

    States and logits of families differ in size, so each has thresholds of its own, one per layer.
    """
    model = tiny.model(family)
    with torch.no_grad():
        states = model(tiny.token_ids(LENGTH)[None], output_hidden_states=True).hidden_states[:-1]  # the last is normed
        entropies = [head_entropy(model, state[0]) for state in states[1:]]
    updates = [after[0] - before[0] for before, after in pairwise(states)]
    drifts = [update.norm(dim=-1) for update in updates]
    relative = [drift / after[0].norm(dim=-1) for drift, after in zip(drifts, states[1:], strict=True)]
    cosines = torch.cosine_similarity(updates[1], updates[0], dim=-1)
    most = rules.RelativeDriftRule(quantiles(relative, 0.75))
    return {
        "drift": rules.DriftRule(quantiles(drifts, 0.5)),
        "relative": rules.RelativeDriftRule(quantiles(relative, 0.5)),
        "fixed_point": rules.FixedPointRule(most.threshold, min_cosine=float(cosines.quantile(0.25))),
        "entropy": rules.EntropyRule(quantiles(entropies, 0.5)),
        "random": rules.RandomRule(0.3, seed=5),
        "all": rules.AllRule((most, rules.EntropyRule(quantiles(entropies, 0.75)))),
    }


def quantiles(values: list[torch.Tensor], share: float) -> tuple[float, ...]:
    """Return one threshold per layer below which a share of the tokens is; after the last layer no rule is asked."""
    return (*(float(each.quantile(share)) for each in values), 1.0)


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
@pytest.mark.parametrize("name", DECIDED)
def test_decided_halting(family: str, fill: rules.FillRule, name: str) -> None:
    model, ids, rule = tiny.model(family), tiny.token_ids(LENGTH), telling(family)[name]
    entropy = partial(head_entropy, model)

    def halts(layer_idx, before, after, previous):
        return rule.decide(LayerView(layer_idx, before, after, previous, torch.arange(LENGTH), ids, entropy)).halt

    check(model, ids, rule, fill, halts)


@pytest.mark.parametrize("name", DECIDED)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_rules_above_halt_some_tokens_but_not_all(family: str, name: str) -> None:
    trace = run_whole(decoder(tiny.model(family), halting_plan(telling(family)[name])), tiny.token_ids(LENGTH)).trace
    assert 1.0 < trace.mean_depth < 4.0


def test_the_oracle_without_halting_is_transformers() -> None:
    for name in (*tiny.FAMILIES, *tiny.VARIANTS):
        model, ids = tiny.model(name), tiny.token_ids(16)
        never = oracle.run(model, ids, rules.DropFill(), lambda *_: torch.zeros(16, dtype=torch.bool))
        with torch.no_grad():
            expected = model(ids[None]).logits[0]
        torch.testing.assert_close(never.logits, expected, atol=tolerances.LOGITS[torch.float32], rtol=0)
