"""Shortcuts equal their definition, save what they say, and have one meaning however tokens are fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from quicksilver import rules
from quicksilver.families.cost import executed_cost
from quicksilver.families.registry import adapt
from quicksilver.families.spec import MLP, QUERY
from quicksilver.plan import Plan
from quicksilver.rules import Part, Shortcut, UniformBitsRule
from tests import oracle, tiny, tolerances
from tests.engines import FILLS, Run, decoder, run_batch, run_chunks, run_steps, run_whole, shortcut_plan
from tests.semantics.test_precision import CHANNEL, TOKEN, Definition

LENGTH = 30
SPECIAL = 7
ALL = tuple(Shortcut(layer, part, 1.0) for layer in range(4) for part in get_args(Part))
SETS: dict[str, tuple[Shortcut, ...]] = {
    "an mlp": (Shortcut(1, "mlp"),),
    "an attention": (Shortcut(2, "attention"),),
    "a whole layer": (Shortcut(1, "attention"), Shortcut(1, "mlp")),
    "a gated mlp": (Shortcut(1, "mlp", 1.5),),
    "a gated attention": (Shortcut(1, "attention", 1.0),),
    "everything, gated": ALL,
    "gated and not": (Shortcut(0, "attention", 0.8), Shortcut(0, "mlp"), Shortcut(3, "attention"), ALL[-2]),
}
DEPTHS = (4, 2, 3, 4, 1, 4)
JOINS = (False, True, True, False, True)
PROPAGATE = rules.KVConfig(rules.PropagateFill())
HALTING = rules.HaltingConfig(rules.ForcedRule(DEPTHS), min_layer=1, protect_first=0, protect_special=False)


def fusing(weights: rules.FusionWeights = "last") -> rules.FusionConfig:
    rule, free = rules.ForcedFusionRule(JOINS), {"protect_first": 0, "protect_special": False}
    return rules.FusionConfig(rule, layers=(1, 2), max_group=3, weights=weights, **free)


def halts(layer_idx: int, before: Tensor, *_: object) -> Tensor:
    return torch.tensor([DEPTHS[t % len(DEPTHS)] <= layer_idx + 1 for t in range(len(before))])


def bypass(plan: Plan, ids: Tensor) -> oracle.Bypass:
    """What a shortcut means, token by token: the map, and the gate's exponential against the threshold."""
    assert plan.halting is not None
    assert plan.tensors is not None
    config, tensors = plan.halting.for_shortcuts, plan.tensors
    chosen = {(shortcut.layer, shortcut.part): shortcut for shortcut in config.shortcuts}

    def past(layer_idx: int, part: str, normed: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        shortcut = chosen.get((layer_idx, part))  # type: ignore[call-overload]
        if shortcut is None:
            return oracle.through(layer_idx, part, normed, state)
        of = {key.removeprefix(f"{shortcut.name}."): value.to(normed.dtype) for key, value in tensors.items()}
        mapped = normed @ (of["weight"] if "weight" in of else of["down"] @ of["up"]) + of["bias"]
        takes = []
        for t, (x, h) in enumerate(zip(normed, state, strict=True)):
            error = (of["gate"] * torch.cat((x, h.norm().log()[None], torch.ones(1)))).sum().exp()
            kept = t < config.protect_first or (config.protect_special and int(ids[t]) == SPECIAL)
            takes.append(not kept and (shortcut.threshold is None or float(error) < shortcut.threshold))
        return torch.tensor(takes), mapped

    return past


def check(
    model: Any,
    plan: Plan,
    ids: Tensor,
    read: oracle.Read = oracle.whole,
    halting: oracle.Halts | None = None,
) -> Run:
    """Compare the engine with the oracle: logits, depths, groups, who went past what, and pairs scored."""
    fusion = None
    if plan.fusion is not None:
        grouped = (plan.fusion.after_layers(4), plan.fusion.max_group, plan.fusion.weights)
        fusion = oracle.Fusion(*grouped, lambda layer_idx, hidden, earlier, later: JOINS[later % len(JOINS)])
    halting = halting or (oracle.never if plan.halting is None or plan.halting.rule is None else halts)
    expected = oracle.run(model, ids, plan.kv.fill, halting, fusion, read, bypass(plan, ids))
    run = run_whole(decoder(model, plan, special_ids=[SPECIAL]), ids)
    layers = run.trace.layers
    assert torch.equal(run.trace.depths[0], expected.depths)
    assert [{part: layer.shortcut_rows[part] for part in get_args(Part)} for layer in layers] == expected.past
    assert [layer.attended for layer in layers] == expected.attended
    assert [sorted(layer.group_sizes.elements()) for layer in layers] == expected.sizes
    torch.testing.assert_close(run.logits, expected.logits, atol=tolerances.LOGITS[run.logits.dtype], rtol=0)
    return run


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MORE])
def test_shortcuts_equal_their_definition(family: str, rank: int | None, name: str) -> None:
    run = check(tiny.model(family), shortcut_plan(*SETS[name], rank=rank), tiny.token_ids(LENGTH))
    norms = adapt(tiny.model(family)).layers[0].norms
    for shortcut in SETS[name]:
        taken = run.trace.layers[shortcut.layer].shortcut_rows[shortcut.part]
        if shortcut.part in norms or shortcut.threshold is None:  # these gates are for normed inputs
            assert taken == LENGTH if shortcut.threshold is None else 0 < taken < LENGTH


@pytest.mark.parametrize("fill", FILLS, ids=lambda fill: type(fill).__name__)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_with_halting(family: str, name: str, fill: rules.FillRule) -> None:
    check(
        tiny.model(family), shortcut_plan(*SETS[name], halting=HALTING, kv=rules.KVConfig(fill)), tiny.token_ids(LENGTH)
    )


@pytest.mark.parametrize("weights", get_args(rules.FusionWeights))
@pytest.mark.parametrize("halting", [None, HALTING], ids=["", "halting"])
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_with_fusion(family: str, name: str, halting: rules.HaltingConfig | None, weights: rules.FusionWeights) -> None:
    plan = shortcut_plan(*SETS[name], halting=halting, kv=PROPAGATE, fusion=fusing(weights))
    check(tiny.model(family), plan, tiny.token_ids(LENGTH))


@pytest.mark.parametrize("rule", [UniformBitsRule(4), CHANNEL, TOKEN], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("others", ["", "halting", "fusion", "halting and fusion"])
@pytest.mark.parametrize("name", ["a whole layer", "everything, gated"])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_with_widths(family: str, name: str, others: str, rule: rules.PrecisionRule) -> None:
    model, ids = tiny.quantized(family, torch.float64), tiny.token_ids(9)
    precision = rules.PrecisionConfig(rule, protect_first=0, protect_special=False)
    halting, fusion = HALTING if "halting" in others else None, fusing() if "fusion" in others else None
    plan = shortcut_plan(*SETS[name], precision=precision, halting=halting, fusion=fusion, kv=PROPAGATE)
    meaning = Definition(model, rule)

    def stops(layer_idx: int, before: Tensor, after: Tensor, previous: Tensor | None) -> Tensor:
        decided = meaning.after_layer(layer_idx, before, after, previous)
        return decided if halting is None else decided | halts(layer_idx, before)

    if halting is not None and isinstance(rule, rules.EntropyBitsRule):
        plan = replace(plan, kv=rules.KVConfig())  # what halted before has decided no number of bits of its own
    check(model, plan, ids, meaning.read, stops)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_protected_tokens_run_everything(family: str, name: str) -> None:
    ids = tiny.token_ids(LENGTH)
    ids[11] = SPECIAL
    plan = shortcut_plan(*SETS[name], protection={"protect_first": 3, "protect_special": True})
    run = check(tiny.model(family), plan, ids)
    for shortcut in SETS[name]:
        layer = run.trace.layers[shortcut.layer]
        assert shortcut.threshold is not None or layer.shortcut_rows[shortcut.part] == LENGTH - 4
    first = decoder(tiny.model(family), plan, special_ids=[SPECIAL])
    dense = run_whole(decoder(tiny.model(family), Plan.dense()), ids[:3])
    assert torch.equal(run_whole(first, ids[:3]).logits, dense.logits)


def seen_rows(model: Any, modules: dict[str, Any], feed: Callable[[], Run]) -> dict[str, int]:
    """Return how many rows each module was given while something was fed."""
    counts = dict.fromkeys(modules, 0)

    def count(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(module: Any, args: tuple[Tensor, ...]) -> None:
            counts[name] += args[0].shape[0]

        return add

    handles = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    try:
        feed()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def test_only_rows_that_run_a_sublayer_reach_its_maps() -> None:
    model, ids = tiny.from_config(tiny.CONFIGS["llama"]()), tiny.token_ids(LENGTH)
    layer = model.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    modules = {
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
        "o": attention.o_proj,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }
    engine = decoder(model, shortcut_plan(*ALL))
    taken = run_whole(engine, ids).trace.layers[1].shortcut_rows
    asking, through = LENGTH - taken["attention"], LENGTH - taken["mlp"]
    assert 0 < asking < LENGTH
    assert 0 < through < LENGTH
    expected = {"q": asking, "k": LENGTH, "v": LENGTH, "o": asking, "gate": through, "up": through, "down": through}
    assert seen_rows(model, modules, lambda: run_whole(engine, ids)) == expected
    everyone = decoder(model, shortcut_plan(*SETS["a whole layer"]))
    expected = {name: LENGTH if name in ("k", "v") else 0 for name in modules}
    for feed in (run_whole, run_steps):
        assert seen_rows(model, modules, lambda feed=feed: feed(everyone, ids)) == expected


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_layer_past_which_everyone_goes_still_writes_entries_and_reads_none(family: str) -> None:
    run = run_whole(decoder(tiny.model(family), shortcut_plan(*SETS["a whole layer"])), tiny.token_ids(LENGTH))
    layer = run.trace.layers[1]
    assert run.cache.entry_counts(1) == [LENGTH]
    assert (layer.query_rows, layer.attended, layer.entries_read) == (LENGTH, 0, 0)
    assert run.trace.head_rows == LENGTH
    assert run.trace.mean_depth == 4.0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_gate_that_lets_nobody_past_leaves_the_dense_model_bit_for_bit(family: str) -> None:
    ids = tiny.token_ids(20)
    shut = decoder(tiny.model(family), shortcut_plan(*(replace(shortcut, threshold=1e-30) for shortcut in ALL)))
    dense = run_whole(decoder(tiny.model(family), Plan.dense()), ids)
    assert torch.equal(run_whole(shut, ids).logits, dense.logits)
    assert torch.equal(run_steps(shut, ids).logits, run_steps(decoder(tiny.model(family), Plan.dense()), ids).logits)


@pytest.mark.parametrize("halting", [None, HALTING], ids=["", "halting"])
@pytest.mark.parametrize(("family", "name"), tiny.on_telling(SETS, everywhere=["gated and not"]))
def test_one_meaning_however_tokens_are_fed(family: str, halting: rules.HaltingConfig | None, name: str) -> None:
    plan = shortcut_plan(*SETS[name], halting=halting, kv=PROPAGATE, protection={"protect_first": 2})
    engine, ids = decoder(tiny.model(family), plan), tiny.token_ids(LENGTH)
    whole, atol = run_whole(engine, ids), tolerances.LOGITS[torch.float32]
    for fed in (run_steps(engine, ids), run_chunks(engine, ids, [1, 4, 12, 13])):
        torch.testing.assert_close(fed.logits, whole.logits, atol=atol, rtol=0)
        for one, other in zip(fed.trace.layers, whole.trace.layers, strict=True):
            assert one.shortcut_rows == other.shortcut_rows
        assert executed_cost(engine.spec, fed.trace) == executed_cost(engine.spec, whole.trace)
    sequences = [tiny.token_ids(n, seed=n) for n in (5, 1, 17, 2)]
    alone = torch.cat([run_whole(engine, each).logits for each in sequences])
    torch.testing.assert_close(run_batch(engine, sequences).logits, alone, atol=atol, rtol=0)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_prefill_equals_decode_in_bfloat16(family: str, rank: int | None) -> None:
    """Gates are asked in float32; a threshold that no token is near decides alike however tokens are fed."""
    model = tiny.from_config(tiny.CONFIGS[family]()).bfloat16()
    engine, ids = decoder(model, shortcut_plan(*SETS["gated and not"], rank=rank)), tiny.token_ids(24)
    whole, steps = run_whole(engine, ids), run_steps(engine, ids, prompt=9)
    assert whole.logits.dtype == torch.bfloat16
    assert [layer.shortcut_rows for layer in whole.trace.layers] == [
        layer.shortcut_rows for layer in steps.trace.layers
    ]
    assert 0 < whole.trace.layers[0].shortcut_rows["attention"] < 24
    error = (whole.logits.float() - steps.logits.float()).abs().max() / whole.logits.float().abs().max()
    assert error < tolerances.LOGITS[torch.bfloat16]


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_widths_are_counted_only_where_weights_are_read(family: str) -> None:
    precision = rules.PrecisionConfig(UniformBitsRule(4), protect_first=0, protect_special=False)
    engine = decoder(tiny.quantized(family), shortcut_plan(*ALL, precision=precision))
    trace, spec = run_whole(engine, tiny.token_ids(LENGTH)).trace, engine.spec
    for layer in trace.layers:
        past = layer.shortcut_rows
        assert past["mlp"] * past["attention"] > 0
        of_layer = spec.layers[0]
        macs = LENGTH * of_layer.macs_of() - past["mlp"] * of_layer.macs_of(*MLP)
        macs -= past["attention"] * of_layer.macs_of(*QUERY)
        assert layer.macs_by_bits == [0, 0, 0, 0, macs, 0, 0, 0, 0]
