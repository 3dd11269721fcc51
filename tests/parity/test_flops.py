"""The FLOPs counted from the trace equal what PyTorch's own counter sees, and what the oracle says ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quicksilver.families.cost import dense_cost, executed_cost, signal_macs
from quicksilver.plan import Plan
from quicksilver.rules import (
    AllRule,
    CosineFusionRule,
    DropFill,
    EntropyRule,
    FillRule,
    FittedRule,
    ForcedFusionRule,
    ForcedRule,
    HaltingConfig,
    KVConfig,
    PropagateFill,
    Shortcut,
    ZeroFill,
)
from tests import tiny
from tests.engines import decoder, fusion_plan, halting_plan, run_steps, run_whole, shortcut_plan, with_maps

PAST = (Shortcut(0, "mlp"), Shortcut(1, "attention"), Shortcut(2, "attention"), Shortcut(2, "mlp"))
HALTING = HaltingConfig(ForcedRule((2, 1, 4, 3, 4)), min_layer=1, protect_first=0, protect_special=False)
SEVERAL = fusion_plan(
    ForcedFusionRule((False, True, True, False, True)), ForcedRule((4, 4, 2)), PropagateFill(), layers=(1, 2, 3)
)
PLANS = {
    "dense": Plan.dense(),
    **{
        type(fill).__name__: halting_plan(ForcedRule((1, 3, 5, 2)), fill)
        for fill in (DropFill(), ZeroFill(), PropagateFill())
    },
    "fusion": fusion_plan(ForcedFusionRule((False, True, True))),
    "shortcuts": shortcut_plan(*PAST, protection={"protect_first": 3}),
    "low-rank shortcuts and halting": shortcut_plan(*PAST, rank=3, halting=HALTING, kv=KVConfig(PropagateFill())),
    "fusion at several layers and halting": SEVERAL,
    "maps": with_maps(halting_plan(ForcedRule((1, 3, 5, 2))), tiny.fitted()),
    "maps of low rank, fusion": with_maps(SEVERAL, tiny.fitted(rank=3)),
}
OF_FAMILIES = ("dense", "DropFill", "PropagateFill", "shortcuts", "fusion at several layers and halting")


def counted_by_torch(run: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a run gives, and the FLOPs that PyTorch counts in it."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


@pytest.mark.parametrize(("family", "name"), tiny.on_telling(PLANS, everywhere=OF_FAMILIES))
def test_decode_flops_equal_torchs_counter(family: str, name: str) -> None:
    """Token by token nothing is masked, so causal counting and PyTorch's agree to the last FLOP."""
    engine, ids = decoder(tiny.model(family), PLANS[name], attention="eager"), tiny.token_ids(12)
    run, counted = counted_by_torch(lambda: run_steps(engine, ids))
    assert executed_cost(engine.spec, run.trace).flops == counted


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefill_flops_differ_from_torchs_only_in_the_upper_triangle(family: str) -> None:
    engine, ids = decoder(tiny.model(family), Plan.dense(), attention="eager"), tiny.token_ids(20)
    run, counted = counted_by_torch(lambda: run_whole(engine, ids))
    masked = sum(20 * 20 - layer.attended for layer in run.trace.layers)
    executed = executed_cost(engine.spec, run.trace)
    assert executed.flops + 2 * masked * engine.spec.attention_macs_per_pair == counted
    assert executed == dense_cost(engine.spec, run.trace)


def test_transformers_itself_costs_what_the_dense_count_says() -> None:
    for family in tiny.FAMILIES:
        model, ids = tiny.model(family), tiny.token_ids(1)
        engine = decoder(model, Plan.dense())
        with torch.no_grad():
            _, expected = counted_by_torch(lambda model=model, ids=ids: model(ids[None]))
        assert dense_cost(engine.spec, run_whole(engine, ids).trace).flops == expected


def test_entropy_signal_counts_the_head() -> None:
    plan = halting_plan(EntropyRule(0.0, layers=(1, 2)))
    engine, ids = decoder(tiny.model("llama"), plan, attention="eager"), tiny.token_ids(10)
    run, counted = counted_by_torch(lambda: run_steps(engine, ids))
    softmax_macs = signal_macs(engine.spec, "head") - engine.spec.head_macs
    assert executed_cost(engine.spec, run.trace).flops == counted + 2 * 2 * 10 * softmax_macs


def test_maps_count_once_for_each_token_that_stops() -> None:
    """Ten tokens, five of which halt after layer 1 by their entropy too, which is taken of their own states."""
    rule = AllRule((EntropyRule(1e9, layers=(1,)), ForcedRule((2, 4))))
    plan = with_maps(halting_plan(rule), tiny.fitted(rank=3))
    engine, ids = decoder(tiny.model("llama"), plan, attention="eager"), tiny.token_ids(10)
    run, counted = counted_by_torch(lambda: run_steps(engine, ids))
    assert [layer.fitted_macs for layer in run.trace.layers] == [0, 5 * 2 * 32 * 3, 0, 0]
    assert [layer.fitted_bytes for layer in run.trace.layers] == [0, 5 * 4 * (2 * 32 * 3 + 32), 0, 0]
    assert executed_cost(engine.spec, run.trace) == executed_cost(engine.spec, run_whole(engine, ids).trace)
    softmax_macs = signal_macs(engine.spec, "head") - engine.spec.head_macs
    assert executed_cost(engine.spec, run.trace).flops == counted + 2 * 10 * softmax_macs


def test_gates_and_their_features_count() -> None:
    """Ten tokens, none of which halts: three norms (of 2d), a cosine (4d), where an update came before, and d + 4."""
    plan = replace(halting_plan(FittedRule(0.0)), tensors=tiny.fitted(gates=(0, 2)))
    engine, ids = decoder(tiny.model("gpt2"), plan), tiny.token_ids(10)
    trace = run_whole(engine, ids).trace
    assert [dict(layer.signal_rows) for layer in trace.layers] == [{"norm": 30}, {}, {"norm": 30, "cosine": 10}, {}]
    cost, dense = executed_cost(engine.spec, trace), dense_cost(engine.spec, trace)
    assert cost.flops - dense.flops == 2 * 10 * (2 * 3 * 2 * 32 + 4 * 32 + 2 * 36)
    assert cost.weight_bytes - dense.weight_bytes == 10 * 2 * 36 * 4


@pytest.mark.parametrize("kv", [DropFill(), ZeroFill(), PropagateFill()], ids=lambda f: type(f).__name__)
def test_prefill_and_decode_count_the_same_work(kv: FillRule) -> None:
    engine, ids = decoder(tiny.model("qwen3"), halting_plan(ForcedRule((2, 1, 4, 3, 4)), kv)), tiny.token_ids(30)
    whole, steps = run_whole(engine, ids).trace, run_steps(engine, ids).trace
    assert executed_cost(engine.spec, whole) == executed_cost(engine.spec, steps)


def test_similarity_and_merged_means_count() -> None:
    """Ten tokens, all alike: nine pairs compared after each of two layers, means merged into."""
    plan = fusion_plan(CosineFusionRule(-1.0), layers=(1, 2), weights="mass", max_group=2)
    engine, ids = decoder(tiny.model("llama"), plan, attention="eager"), tiny.token_ids(10)
    trace = run_whole(engine, ids).trace
    assert [layer.fusion_rows for layer in trace.layers] == [10, 5, 0, 0]
    assert [layer.fused for layer in trace.layers] == [5, 0, 0, 0]
    assert not any(layer.fill_rows for layer in trace.layers)
    assert [dict(layer.signal_rows) for layer in trace.layers[:2]] == [
        {"cosine": 9, "mean": 5},
        {"cosine": 4},
    ]
    spec = engine.spec
    macs = sum(layer.query_rows for layer in trace.layers) * spec.layers[0].macs_of()
    macs += sum(layer.attended for layer in trace.layers) * spec.attention_macs_per_pair
    macs += (13 * 4 + 5) * spec.hidden_size + 10 * spec.head_macs
    assert executed_cost(spec, trace).flops == 2 * macs


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gates_count_for_every_token_that_they_are_asked_about(family: str) -> None:
    """PyTorch's counter sees the product with the input; the norm, its weight and the constant are counted by hand."""
    gated = tuple(Shortcut(layer, part, 1.0) for layer, part in ((1, "mlp"), (2, "attention")))
    plan = shortcut_plan(*gated, halting=HALTING, kv=KVConfig(PropagateFill()), protection={"protect_first": 5})
    engine, ids = decoder(tiny.model(family), plan, attention="eager"), tiny.token_ids(20)
    run, seen = counted_by_torch(lambda: run_steps(engine, ids))
    past = run.trace.layers[1].shortcut_rows["mlp"], run.trace.layers[2].shortcut_rows["attention"]
    asked = 15 * 4 // 5, 15 * 3 // 5  # tokens from the sixth on that run more than one layer, more than two
    assert 0 < sum(past) < sum(asked)
    unseen = sum(asked) * (engine.spec.hidden_size + 2)
    assert executed_cost(engine.spec, run.trace).flops == seen + 2 * unseen


@pytest.mark.parametrize("rank", [None, 3])
def test_a_shortcut_saves_its_sublayers_bytes_and_reads_its_maps(rank: int | None) -> None:
    """Worked out from the modules' own parameters: 6 tokens, one of them protected."""
    parts, ids = (Shortcut(0, "mlp"), Shortcut(1, "attention", 1e9)), tiny.token_ids(6)
    for family in ("gpt2", "qwen2"):
        model = tiny.model(family)
        engine = decoder(model, shortcut_plan(*parts, rank=rank, protection={"protect_first": 1}))
        cost, dense = (
            executed_cost(each.spec, run_whole(each, ids).trace) for each in (engine, decoder(model, Plan.dense()))
        )
        layer = model.transformer.h[0] if family == "gpt2" else model.model.layers[0]
        if family == "gpt2":
            c_attn = layer.attn.c_attn
            queries = [*layer.attn.c_proj.parameters(), c_attn.weight[:, :32], c_attn.bias[:32]]
        else:
            queries = [p for m in (layer.self_attn.q_proj, layer.self_attn.o_proj) for p in m.parameters()]
        skipped = sum(p.numel() for p in (*layer.mlp.parameters(), *queries))
        fitted = 2 * ((32 * 32 if rank is None else 2 * 32 * rank) + 32) + 34
        assert dense.weight_bytes - cost.weight_bytes == 5 * 4 * (skipped - fitted)
        assert cost.bitops == cost.flops // 2 * 32 * 32


def test_bytes_and_bit_operations_are_those_of_the_weights_read() -> None:
    """Worked out from the modules' own parameters: 4 tokens at depths 1 and 4, keys and values propagated."""
    model = tiny.model("qwen2")
    engine, ids = decoder(model, halting_plan(ForcedRule((1, 4)), PropagateFill())), tiny.token_ids(4)
    cost = executed_cost(engine.spec, run_whole(engine, ids).trace)
    layers, attention = model.model.layers, model.model.layers[0].self_attn
    layer = sum(p.numel() for p in layers[0].parameters())
    projections = sum(p.numel() for m in (attention.k_proj, attention.v_proj) for p in m.parameters())
    head = model.lm_head.weight.numel() + model.model.norm.weight.numel()
    assert cost.weight_bytes == 4 * ((2 * 1 + 2 * 4) * layer + 2 * 3 * projections + 4 * head)
    assert cost.bitops == cost.flops // 2 * 32 * 32
    entropy = decoder(model, halting_plan(EntropyRule(0.0, layers=(1,))))
    cost = executed_cost(entropy.spec, run_whole(entropy, ids).trace)
    assert cost.weight_bytes == 4 * (4 * 4 * layer + (4 + 4) * head)
