"""Output maps and fitted gates equal the dense masked oracle; a map changes what a token predicts and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quicksilver import rules
from quicksilver.core.decisions import LayerView
from quicksilver.errors import PlanError
from quicksilver.plan import Plan
from quicksilver.plan.tensors import PlanTensors
from tests import oracle, tiny, tolerances
from tests.engines import (
    FILLS,
    decoder,
    fusion_plan,
    halting_plan,
    run_batch,
    run_chunks,
    run_steps,
    run_whole,
    with_maps,
)
from tests.oracle_parts import head_entropy

RANKS = pytest.mark.parametrize("rank", [None, 3], ids=["full", "low rank"])
LENGTH = 40
ATOL = tolerances.LOGITS[torch.float32]
DECIDED = {
    "fitted": rules.FittedRule(1.0),
    "fitted, by layer": rules.FittedRule((0.5, 1.0, 2.0, 9.0)),
    "entropy": rules.EntropyRule(6.9),
    "both": rules.AllRule((rules.FittedRule(2.0), rules.EntropyRule(7.1))),
}


def mapped(plan: Plan, tensors: PlanTensors | None = None, **config: bool) -> Plan:
    """Return a plan with output maps."""
    return with_maps(plan, tensors or tiny.fitted(), **config)


def added(tensors: PlanTensors) -> dict[int, Callable[[Tensor], Tensor]]:
    """Return what each layer's output map adds to states [T, d], written out."""

    def add(layer_idx: int, hidden: Tensor) -> Tensor:
        name = f"output.{layer_idx}"
        if f"{name}.weight" in tensors:
            weight = tensors[f"{name}.weight"]
        else:
            weight = tensors[f"{name}.down"] @ tensors[f"{name}.up"]
        return torch.einsum("ti,io->to", hidden, weight) + tensors[f"{name}.bias"]

    layers = [i for i in range(4) if f"output.{i}.bias" in tensors]
    return {layer_idx: lambda hidden, i=layer_idx: add(i, hidden) for layer_idx in layers}


def forced(depths: Tensor) -> oracle.Halts:
    return lambda layer_idx, *_: depths <= layer_idx + 1


def decided(model, ids: Tensor, plan: Plan) -> oracle.Halts:
    """Ask the plan's rule about the states themselves, gates looked up by name."""
    assert plan.halting is not None
    assert plan.tensors is not None
    rule, tensors = plan.halting.rule, plan.tensors

    def halts(layer_idx: int, before: Tensor, after: Tensor, previous: Tensor | None) -> Tensor:
        view = LayerView(
            layer_idx,
            before,
            after,
            previous,
            torch.arange(len(ids)),
            ids,
            lambda hidden: head_entropy(model, hidden),
            tensors.get(f"gate.{layer_idx}.weight"),
        )
        return rule.decide(view).halt

    return halts


def check(model, ids: Tensor, plan: Plan, halts: oracle.Halts, fusion: oracle.Fusion | None = None) -> Tensor:
    """Compare the engine with the oracle; return the depths."""
    assert plan.tensors is not None
    maps = added(plan.tensors) if plan.halting is not None and plan.halting.output_maps else {}
    expected = oracle.run(model, ids, plan.kv.fill, halts, fusion, maps=maps)
    run = run_whole(decoder(model, plan), ids)
    assert torch.equal(run.trace.depths[0], expected.depths)
    assert [layer.attended for layer in run.trace.layers] == expected.attended
    torch.testing.assert_close(run.logits, expected.logits, atol=ATOL, rtol=0)
    return expected.depths


@RANKS
@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_forced_random_depths(family: str, fill: rules.FillRule, rank: int | None) -> None:
    ids, depths = tiny.token_ids(LENGTH), torch.randint(1, 5, (LENGTH,), generator=torch.Generator().manual_seed(1))
    plan = mapped(halting_plan(rules.ForcedRule(tuple(depths.tolist())), fill), tiny.fitted(1, rank))
    check(tiny.model(family), ids, plan, forced(depths))


@pytest.mark.parametrize("name", DECIDED)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_decided_halting(family: str, name: str) -> None:
    model, ids = tiny.model(family), tiny.token_ids(LENGTH)
    plan = mapped(halting_plan(DECIDED[name], rules.PropagateFill()))
    depths = check(model, ids, plan, decided(model, ids, plan))
    assert 1.0 < depths.float().mean() < 4.0


@pytest.mark.parametrize("weights", ["last", "mass"])
@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_absorbed_tokens_are_mapped_where_the_layer_has_a_map(
    family: str, fill: rules.FillRule, weights: rules.FusionWeights
) -> None:
    """Fusion after layers 0 and 1, halting from layer 1 on: the plan holds no map of layer 0."""
    ids, generator = tiny.token_ids(LENGTH, 5), torch.Generator().manual_seed(7)
    joins = tuple((torch.rand(LENGTH, generator=generator) < 0.7).tolist())
    depths = torch.randint(2, 6, (LENGTH,), generator=generator)
    rule, stops = rules.ForcedFusionRule(joins), rules.ForcedRule(tuple(depths.tolist()))
    plan = fusion_plan(rule, stops, fill, layers=(1, 2), weights=weights)
    assert plan.halting is not None
    plan = mapped(replace(plan, halting=replace(plan.halting, min_layer=2)), tiny.fitted(outputs=(1, 2)))
    fusion = oracle.Fusion((0, 1), 3, weights, lambda layer_idx, hidden, earlier, later: joins[later])
    ran = check(tiny.model(family), ids, plan, forced(depths), fusion)
    assert set(ran.tolist()) == {1, 2, 3, 4}
    no_halting = replace(plan, halting=rules.HaltingConfig(output_maps=True))
    check(tiny.model(family), ids, no_halting, oracle.never, fusion)


@pytest.mark.parametrize("rule", [rules.FittedRule(0.8), rules.EntropyRule(6.8)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_decided_halting_of_groups(family: str, rule: rules.HaltingRule) -> None:
    model, ids, joins = tiny.model(family), tiny.token_ids(LENGTH, 5), (False, True, False, False, True)
    plan = fusion_plan(rules.ForcedFusionRule(joins), rule, rules.PropagateFill(), layers=(1, 2))
    plan = mapped(plan)
    fusion = oracle.Fusion((0, 1), 3, "last", lambda layer_idx, hidden, earlier, later: joins[later % 5])
    check(model, ids, plan, decided(model, ids, plan), fusion)


@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_map_changes_what_stopped_tokens_predict_and_nothing_else(family: str, fill: rules.FillRule) -> None:
    plan, ids = halting_plan(rules.ForcedRule((1, 4, 2, 3, 4)), fill), tiny.token_ids(LENGTH)
    plain, other = (run_whole(decoder(tiny.model(family), each), ids) for each in (plan, mapped(plan)))
    full = plain.trace.depths[0] == 4
    assert torch.equal(plain.logits[full], other.logits[full])
    assert bool(((plain.logits - other.logits)[~full].abs().amax(-1) > 0.1).all())
    for layer_idx in range(4):
        one, two = plain.cache.entries(layer_idx, 0), other.cache.entries(layer_idx, 0)
        assert torch.equal(one.keys, two.keys)
        assert torch.equal(one.values, two.values)


def test_what_no_mechanism_uses_changes_no_bit() -> None:
    plan, ids = halting_plan(rules.RandomRule(0.3)), tiny.token_ids(LENGTH)
    unused = (
        (plan, replace(plan, tensors=tiny.fitted())),
        (plan, mapped(plan, output_maps=False)),
        (Plan.dense(), mapped(Plan.dense())),
        (Plan.dense(), mapped(halting_plan(rules.FittedRule(0.0)))),
    )
    for one, other in unused:
        runs = [run_steps(decoder(tiny.model("gpt2"), each), ids, prompt=9) for each in (one, other)]
        assert torch.equal(runs[0].logits, runs[1].logits)


def test_a_static_exit_is_forced_halting_at_one_depth() -> None:
    """Every token runs two of the four layers and predicts through the map; nobody pays for a signal."""
    model, ids, tensors = tiny.model("llama"), tiny.token_ids(LENGTH), tiny.fitted(outputs=(1, 2))
    engine = decoder(model, mapped(halting_plan(rules.ForcedRule((2,)), min_layer=2), tensors))
    with torch.no_grad():
        state = model(ids[None], output_hidden_states=True).hidden_states[2][0]
        expected = model.lm_head(model.model.norm(state + added(tensors)[1](state)))
    for run in (run_whole(engine, ids), run_steps(engine, ids)):
        torch.testing.assert_close(run.logits, expected, atol=ATOL, rtol=0)
        assert [layer.query_rows for layer in run.trace.layers] == [LENGTH, LENGTH, 0, 0]
        assert not any(layer.signal_rows.total() for layer in run.trace.layers)


def test_a_layer_without_a_gate_halts_nobody_and_asks_nobody() -> None:
    plan = replace(halting_plan(rules.FittedRule(1e9)), tensors=tiny.fitted(gates=(1,)))
    trace = run_whole(decoder(tiny.model("gpt2"), plan), tiny.token_ids(LENGTH)).trace
    assert [layer.halted for layer in trace.layers] == [0, LENGTH, 0, 0]
    assert [layer.signal_rows["norm"] for layer in trace.layers] == [0, 3 * LENGTH, 0, 0]
    plan = replace(plan, tensors=tiny.fitted(gates=(1, 2)), halting=rules.HaltingConfig(rules.FittedRule(0.9), 1))
    engine, ids = decoder(tiny.model("gpt2"), plan, special_ids=[9]), tiny.token_ids(LENGTH)
    ids[7] = 9
    free = run_whole(engine, ids).trace.depths[0]
    assert free[[0, 1, 2, 3, 7]].tolist() == [4] * 5  # protected
    assert 2 in free.tolist()


@pytest.mark.parametrize("prompt", [False, True])
def test_a_prompts_tokens_are_mapped_too(prompt: bool) -> None:
    """Callers may read what any token of a prompt predicts."""
    engine = decoder(tiny.model("llama"), mapped(halting_plan(rules.ForcedRule((1, 3)))))
    ids = tiny.token_ids(12)
    torch.testing.assert_close(
        run_chunks(engine, ids, [5, 7], prompt).logits, run_whole(engine, ids).logits, atol=ATOL, rtol=0
    )


@pytest.mark.parametrize(
    "rule", [rules.RandomRule(0.35, seed=2), rules.FittedRule(1.0)], ids=lambda r: type(r).__name__
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefill_equals_decode_in_bfloat16(family: str, rule: rules.HaltingRule) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]()).bfloat16()
    engine, ids = decoder(model, mapped(halting_plan(rule, rules.PropagateFill()))), tiny.token_ids(24)
    whole, steps = run_whole(engine, ids), run_steps(engine, ids, prompt=9)
    same = torch.cat(whole.trace.depths) == torch.cat(steps.trace.depths)
    crossed = 2 if isinstance(rule, rules.FittedRule) else 0  # rounding takes a token across a threshold
    assert int((~same).sum()) <= crossed
    assert 1.0 < whole.trace.mean_depth < 4.0
    assert whole.logits.dtype == torch.bfloat16
    error = (whole.logits - steps.logits)[same].float().abs().max() / whole.logits.float().abs().max()
    assert error < tolerances.LOGITS[torch.bfloat16]


@pytest.mark.parametrize("name", DECIDED)
def test_a_batch_equals_each_sequence_alone(name: str) -> None:
    engine = decoder(tiny.model("qwen3"), mapped(halting_plan(DECIDED[name], rules.PropagateFill())))
    sequences = [tiny.token_ids(n, seed=n) for n in (11, 1, 30, 2)]
    batch = run_batch(engine, sequences).logits.split([11, 1, 30, 2])
    for ids, logits in zip(sequences, batch, strict=True):
        torch.testing.assert_close(logits, run_steps(engine, ids).logits, atol=ATOL, rtol=0)


FORCED, FITTED = halting_plan(rules.ForcedRule((2,))), halting_plan(rules.FittedRule(1.0))
NARROW = PlanTensors(
    {"output.0.weight": torch.zeros(8, 8), "output.0.bias": torch.zeros(8), "gate.0.weight": torch.zeros(8)}
)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (replace(mapped(FORCED), tensors=None), "output.0.down is missing"),
        (mapped(FORCED, tiny.fitted(outputs=(0, 1))), "output.2.down is missing"),
        (mapped(FORCED, NARROW), r"output.0 has shapes .* the model needs 32 to 32"),
        (
            mapped(fusion_plan(rules.RandomFusionRule(0.1)), NARROW),
            "output.0 has shapes",
        ),
        (FITTED, "none of gate.0.weight to gate.2.weight is in the plan"),
        (
            replace(
                halting_plan(rules.AllRule((rules.FittedRule(1.0),)), min_layer=2), tensors=tiny.fitted(gates=(0,))
            ),
            "none of gate.1.weight to gate.2.weight",
        ),
        (replace(FITTED, tensors=NARROW), r"gate.0.weight has shape \(8,\), the model needs \(36,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plans_whose_tensors_do_not_fit_are_refused(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=f"plan 'test': .*{message}"):
        decoder(tiny.model("llama"), plan)
