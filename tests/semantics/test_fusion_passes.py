"""Fusion at one layer has one meaning however tokens are fed: the cache that a run leaves does not depend on the cuts.

A token that is absorbed later has predicted from a full run before; so logits are compared where the definition
says that they agree: at tokens that were not absorbed. At several layers, the tokens of one pass fuse among themselves.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quicksilver import rules
from quicksilver.core.decisions import PairView
from quicksilver.core.signals import hashed_uniform
from quicksilver.errors import InputError, PlanError
from quicksilver.plan import Plan
from tests import oracle, tiny, tolerances
from tests.engines import FILLS, Run, at_one_layer, decoder, fusion_plan, run_batch, run_chunks, run_steps, run_whole
from tests.strategies import fusing_plans, skipping_plans

ATOL = tolerances.LOGITS[torch.float32]
PLANS = {
    "random": fusion_plan(rules.RandomFusionRule(0.6, seed=1)),
    "late": fusion_plan(rules.RandomFusionRule(0.6, seed=2), layers=(3,), max_group=5),
    "decided": fusion_plan(rules.CosineFusionRule(0.0), layers=(2,), max_group=4, weights="mass"),
    "mean": fusion_plan(rules.RandomFusionRule(0.6, seed=3), weights="mass", max_group=4),
    **{
        f"halting, {type(fill).__name__}": fusion_plan(
            rules.RandomFusionRule(0.7, seed=4), rules.RandomRule(0.2, seed=5), fill, layers=(2,), max_group=4
        )
        for fill in FILLS
    },
}
SEVERAL = {
    "several": fusion_plan(rules.RandomFusionRule(0.6, seed=2), layers=(1, 2, 3), max_group=5),
    "several, mean": fusion_plan(rules.RandomFusionRule(0.6, seed=3), layers=(1, 3), weights="mass", max_group=4),
    "several, halting": fusion_plan(
        rules.RandomFusionRule(0.7, seed=4), rules.RandomRule(0.2, seed=5), layers=(1, 2), max_group=4
    ),
}


def assert_same_cache(one: Run, other: Run, seqs: tuple[int, int] = (0, 0)) -> None:
    for layer_idx in range(one.cache.shape.num_layers):
        first, second = one.cache.entries(layer_idx, seqs[0]), other.cache.entries(layer_idx, seqs[1])
        assert torch.equal(first.positions, second.positions)
        masses = [torch.ones_like(e.positions) if e.masses is None else e.masses for e in (first, second)]
        assert torch.equal(*masses)
        torch.testing.assert_close(first.keys, second.keys, atol=ATOL, rtol=0)
        torch.testing.assert_close(first.values, second.values, atol=ATOL, rtol=0)


def held_bytes(run: Run) -> int:
    """Bytes of one sequence's entries but for masses: a layer keeps those only once a pass that fuses writes to it."""
    masses = (run.cache.entries(layer_idx, 0).masses for layer_idx in range(run.cache.shape.num_layers))
    kept = sum(m.numel() * m.element_size() for m in masses if m is not None)
    group = run.cache.sequences[0].open_group
    open_bytes = 0 if group is None else group.nbytes
    return run.cache.used_nbytes - open_bytes - kept


def assert_same_run(whole: Run, parts: Run) -> None:
    """Compare two runs of one sequence, the first in one pass."""
    assert_same_cache(whole, parts)
    assert held_bytes(whole) == held_bytes(parts)
    for one, other in zip(whole.trace.layers, parts.trace.layers, strict=True):
        assert one.fused == other.fused
        assert +one.group_sizes == +other.group_sizes
    depths = torch.cat(whole.trace.depths), torch.cat(parts.trace.depths)
    unchanged = depths[0] == depths[1]
    # A token that a later pass absorbs had run in full.
    assert int((~unchanged).sum()) <= sum(layer.fused for layer in whole.trace.layers)
    torch.testing.assert_close(whole.logits[unchanged], parts.logits[unchanged], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("family", "name"), tiny.on_telling(PLANS, everywhere=["random"]))
def test_prefill_equals_decode_equals_chunks(family: str, name: str) -> None:
    engine, ids = decoder(tiny.model(family), PLANS[name]), tiny.token_ids(33)
    whole = run_whole(engine, ids)
    assert whole.trace.fused_fraction > 0.2
    assert_same_run(whole, run_steps(engine, ids))
    assert_same_run(whole, run_steps(engine, ids, prompt=20))
    assert_same_run(whole, run_chunks(engine, ids, [4, 1, 13, 15]))


def test_every_cut_of_a_prompt_gives_the_same_cache() -> None:
    for plan in (PLANS["random"], PLANS["late"]):
        engine, ids = decoder(tiny.model("llama"), plan), tiny.token_ids(14)
        whole = run_whole(engine, ids)
        for cut in range(1, 14):
            assert_same_run(whole, run_chunks(engine, ids, [cut, 14 - cut]))


@pytest.mark.parametrize("plan", [*PLANS.values(), *SEVERAL.values()], ids=[*PLANS, *SEVERAL])
def test_batch_of_unequal_prompts_equals_each_alone(plan: Plan) -> None:
    engine = decoder(tiny.model("qwen3"), plan)
    sequences = [tiny.token_ids(n, seed=n) for n in (11, 1, 30, 2)]
    batch = run_batch(engine, sequences)
    for seq, (ids, logits) in enumerate(zip(sequences, batch.logits.split([11, 1, 30, 2]), strict=True)):
        alone = run_whole(engine, ids)
        torch.testing.assert_close(logits, alone.logits, atol=ATOL, rtol=0)
        assert_same_cache(batch, alone, (seq, 0))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_batch_whose_sequences_advance_unevenly(plan: Plan) -> None:
    engine = decoder(tiny.model("llama"), plan)
    sequences = (tiny.token_ids(12, 1), tiny.token_ids(20, 2), tiny.token_ids(9, 3))
    cache, trace = engine.new_cache(3), engine.new_trace(per_token=True)
    for ends in ((5, 1, 0), (5, 9, 1), (6, 10, 2), (12, 10, 3), (12, 20, 9)):
        chunk = [ids[seen:end] for ids, seen, end in zip(sequences, cache.seq_lengths, ends, strict=True)]
        engine.run(torch.cat(chunk), [len(c) for c in chunk], cache, trace)
    uneven = Run(torch.empty(0), cache, trace)
    for seq, ids in enumerate(sequences):
        assert_same_cache(uneven, run_whole(engine, ids), (seq, 0))


@pytest.mark.parametrize("plan", SEVERAL.values(), ids=SEVERAL)
def test_at_several_layers_no_group_crosses_a_pass(plan: Plan) -> None:
    """A run in chunks is the oracle's in which tokens of different chunks are not alike."""
    config, ids, chunks = plan.fusion, tiny.token_ids(30), [9, 1, 13, 7]
    assert config is not None
    passes = torch.arange(len(chunks)).repeat_interleave(torch.tensor(chunks))
    model, engine = tiny.model("llama"), decoder(tiny.model("llama"), plan)
    run = run_chunks(engine, ids, chunks)

    def alike(layer_idx: int, hidden: Tensor, earlier: int, later: int) -> bool:
        ordinal = config.after_layers(4).index(layer_idx)
        view = PairView(layer_idx, ordinal, hidden[[earlier]], hidden[[later]], torch.tensor([later]), ids[[later]])
        return bool(passes[earlier] == passes[later]) and bool(config.rule.decide(view).alike)

    def halts(layer_idx: int, *_: object) -> Tensor:
        if plan.halting is None:
            return torch.zeros(len(ids), dtype=torch.bool)
        rule = plan.halting.rule
        assert isinstance(rule, rules.RandomRule)
        return hashed_uniform(rule.seed, layer_idx, torch.arange(len(ids)), ids) < rule.probability

    fusion = oracle.Fusion(config.after_layers(4), config.max_group, config.weights, alike)
    expected = oracle.run(model, ids, plan.kv.fill, halts, fusion)
    assert torch.equal(torch.cat(run.trace.depths), expected.depths)
    assert [sorted(layer.group_sizes.elements()) for layer in run.trace.layers] == expected.sizes
    torch.testing.assert_close(run.logits, expected.logits, atol=ATOL, rtol=0)
    assert run.cache.sequences[0].open_group is None


def test_several_layers_are_for_prompts() -> None:
    with pytest.raises(PlanError, match=r'got layers \[1, 2\] in scope "all": name one layer, or use scope "prompt"'):
        rules.FusionConfig(rules.CosineFusionRule(0.9), layers=(1, 2), scope="all")


@pytest.mark.slow
@settings(max_examples=80)
@given(plan=fusing_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_any_plan_any_chunking(plan: Plan, family: str, length: int, data: st.DataObject) -> None:
    engine, ids = decoder(tiny.model(family), at_one_layer(plan), special_ids=[7]), tiny.token_ids(length, seed=length)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=5)))
    chunks = [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
    whole = run_chunks(engine, ids, [length], prompt=True)
    assert_same_run(whole, run_chunks(engine, ids, chunks, prompt=True))


@settings(max_examples=40)
@given(plan=skipping_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_any_plan_whose_attention_skips_any_chunking(plan: Plan, family: str, length: int, data: st.DataObject) -> None:
    engine = decoder(tiny.model(family, torch.float64), at_one_layer(plan), special_ids=[7])
    ids = tiny.token_ids(length, seed=length)
    cut = data.draw(st.integers(1, length - 1))
    whole, parts = (run_chunks(engine, ids, chunks, prompt=True) for chunks in ([length], [cut, length - cut]))
    assert_same_cache(whole, parts)
    same = torch.cat(whole.trace.depths) == torch.cat(parts.trace.depths)
    torch.testing.assert_close(whole.logits[same], parts.logits[same], atol=ATOL, rtol=0)


@settings(max_examples=40)
@given(
    plan=fusing_plans,
    family=st.sampled_from(tiny.FAMILIES),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_every_layer_accounts_for_every_token(plan: Plan, family: str, lengths: list[int]) -> None:
    """Mass is conserved: entries, halted tokens without entry and fused ones add up to the tokens fed."""
    engine = decoder(tiny.model(family), plan)
    sequences = [tiny.token_ids(n, seed=n) for n in lengths]
    cache, trace = engine.new_cache(len(lengths)), engine.new_trace(per_token=True)
    engine.run(torch.cat(sequences), lengths, cache, trace, prompt=True)
    dropped = isinstance(plan.kv.fill, rules.DropFill) and plan.halting is not None
    for layer_idx in range(4):
        for seq, length in enumerate(lengths):
            entries = cache.entries(layer_idx, seq)
            held = len(entries.positions) if entries.masses is None else int(entries.masses.sum())
            assert held == length or (dropped and held < length and sum(layer.halted for layer in trace.layers))


@pytest.mark.parametrize("weights", get_args(rules.FusionWeights))
def test_prompt_scope_fuses_prompts_only(weights: rules.FusionWeights) -> None:
    engine = decoder(
        tiny.model("gpt2"), fusion_plan(rules.RandomFusionRule(1.0), scope="prompt", weights=weights, max_group=8)
    )
    ids = tiny.token_ids(24)
    cache, trace = engine.new_cache(1), engine.new_trace(per_token=True)
    engine.run(ids[:16], [16], cache, trace, prompt=True)
    assert cache.entry_counts(3) == [2]
    assert trace.fused_fraction == 14 / 16
    for token in ids[16:].split(1):
        engine.run(token, [1], cache, trace)
    assert cache.entry_counts(3) == [10]
    untouched = run_whole(engine, ids)
    assert untouched.trace.fused_fraction == 0.0
    mixed = engine.new_cache(2)
    engine.run(torch.cat((ids, ids)), [24, 24], mixed, engine.new_trace(), prompt=[False, True])
    assert mixed.entry_counts(3) == [24, 3]


@pytest.mark.parametrize("family", tiny.LAYOUTS)
@pytest.mark.parametrize("weights", get_args(rules.FusionWeights))
def test_prefill_equals_decode_in_bfloat16(family: str, weights: rules.FusionWeights) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]()).bfloat16()
    engine = decoder(model, fusion_plan(rules.RandomFusionRule(0.6, seed=2), layers=(2,), weights=weights))
    ids = tiny.token_ids(24)
    whole, steps = run_whole(engine, ids), run_steps(engine, ids, prompt=9)
    for layer_idx in range(4):
        assert torch.equal(*(run.cache.entries(layer_idx, 0).positions for run in (whole, steps)))
    assert whole.cache.entries(3, 0).keys.dtype == torch.bfloat16
    error = (whole.logits[-1].float() - steps.logits[-1].float()).abs().max() / whole.logits[-1].float().abs().max()
    assert error < tolerances.LOGITS[torch.bfloat16]


@pytest.mark.parametrize("flags", [[True], [True, False, True]], ids=str)
def test_a_wrong_number_of_prompt_flags_is_refused_and_spoils_nothing(flags: list[bool]) -> None:
    engine, ids = decoder(tiny.model("gpt2"), PLANS["random"]), tiny.token_ids(8)
    cache = engine.new_cache(2)
    with pytest.raises(InputError, match=f"prompt has {len(flags)} flags for 2 sequences"):
        engine.run(ids, [5, 3], cache, engine.new_trace(), prompt=flags)
    engine.run(ids, [5, 3], cache, engine.new_trace(), prompt=[True, False])


def test_what_halts_at_random_does_not_say_what_fuses() -> None:
    plan = fusion_plan(rules.RandomFusionRule(0.3, 1), rules.RandomRule(0.3, 1), rules.PropagateFill())
    trace = run_whole(decoder(tiny.model("gpt2"), plan), tiny.token_ids(60)).trace
    assert trace.layers[0].halted > 5
    assert trace.layers[0].fused > 5
