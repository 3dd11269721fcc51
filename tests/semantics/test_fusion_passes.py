"""Fusion has one meaning however tokens are fed: the cache that a run leaves does not depend on where it was cut.

A token that is absorbed later has predicted from a full run before; so logits are compared where the definition
says that they agree: at tokens that were not absorbed.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quicksilver.core import rules
from quicksilver.core.plan import Plan
from quicksilver.errors import InputError
from tests import tiny, tolerances
from tests.engines import Run, decoder, fusion_plan, run_batch, run_chunks, run_steps, run_whole
from tests.strategies import fusing_plans, skipping_plans

ATOL = tolerances.LOGITS[torch.float32]
FILLS = (rules.DropFill(), rules.ZeroFill(), rules.PropagateFill())
PLANS = {
    "one layer": fusion_plan(rules.RandomFusionRule(0.6, seed=1)),
    "nested": fusion_plan(rules.RandomFusionRule(0.6, seed=2), layers=(1, 2, 3), max_group=5),
    "nested, decided": fusion_plan(rules.CosineFusionRule(0.0), layers=(1, 2, 3), max_group=4, weights="mass"),
    "mean": fusion_plan(rules.RandomFusionRule(0.6, seed=3), layers=(1, 3), weights="mass", max_group=4),
    **{
        f"halting, {type(fill).__name__}": fusion_plan(
            rules.RandomFusionRule(0.7, seed=4), rules.RandomRule(0.2, seed=5), fill, layers=(1, 2), max_group=4
        )
        for fill in FILLS
    },
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
    return run.cache.used_nbytes - run.cache.tails.nbytes - kept


def assert_same_run(whole: Run, parts: Run) -> None:
    """Compare two runs of one sequence, the first in one pass."""
    assert_same_cache(whole, parts)
    assert held_bytes(whole) == held_bytes(parts)
    for one, other in zip(whole.trace.layers, parts.trace.layers, strict=True):
        assert one.fused == other.fused
        assert +one.group_sizes == +other.group_sizes
    depths = torch.cat(whole.trace.depths), torch.cat(parts.trace.depths)
    unchanged = depths[0] == depths[1]
    # A token that a later pass absorbs had run in full; and one that loses its absorber so runs again, which is not in
    # its recorded depth.
    assert int((~unchanged).sum()) <= 2 * sum(layer.fused for layer in whole.trace.layers)
    torch.testing.assert_close(whole.logits[unchanged], parts.logits[unchanged], atol=ATOL, rtol=0)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefill_equals_decode_equals_chunks(family: str, plan: Plan) -> None:
    engine, ids = decoder(tiny.model(family), plan), tiny.token_ids(33)
    whole = run_whole(engine, ids)
    assert whole.trace.fused_fraction > 0.2
    assert_same_run(whole, run_steps(engine, ids))
    assert_same_run(whole, run_steps(engine, ids, prompt=20))
    assert_same_run(whole, run_chunks(engine, ids, [4, 1, 13, 15]))


def test_every_cut_of_a_prompt_gives_the_same_cache() -> None:
    for plan in (PLANS["one layer"], PLANS["nested"]):
        engine, ids = decoder(tiny.model("llama"), plan), tiny.token_ids(14)
        whole = run_whole(engine, ids)
        for cut in range(1, 14):
            assert_same_run(whole, run_chunks(engine, ids, [cut, 14 - cut]))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
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


@pytest.mark.parametrize("seed", range(12))
def test_whom_a_token_had_absorbed_runs_again_even_where_it_halts_itself(seed: int) -> None:
    """Nested fusion and much halting: between two fusion layers the row that took a token's place may stop."""
    fusion, halting = rules.RandomFusionRule(0.75, seed), rules.RandomRule(0.4, seed + 50)
    plan = fusion_plan(fusion, halting, rules.PropagateFill(), layers=(1, 2, 3), max_group=6)
    engine, sequences = decoder(tiny.model("llama"), plan), [tiny.token_ids(26, seed=seed + i) for i in range(3)]
    cache, trace = engine.new_cache(3), engine.new_trace(per_token=True)
    for start in range(0, 26, 2):  # the second sequence waits every other time
        sizes = (2, 4 * (start % 4 == 0), 2)
        chunk = [ids[seen : seen + n] for ids, seen, n in zip(sequences, cache.seq_lengths, sizes, strict=True)]
        engine.run(torch.cat(chunk), [len(c) for c in chunk], cache, trace)
    batch = Run(torch.empty(0), cache, trace)
    for seq, ids in enumerate(sequences):
        whole = run_whole(engine, ids)
        assert_same_run(whole, run_steps(engine, ids))
        assert_same_cache(batch, whole, (seq, 0))


@pytest.mark.parametrize("seed", range(20))
def test_a_row_that_took_a_tokens_place_may_halt_where_a_rule_compares_states(seed: int) -> None:
    rule, halting = rules.CosineFusionRule((0.0, -1.0)), rules.RandomRule(0.4, seed)
    plan = fusion_plan(rule, halting, rules.PropagateFill(), layers=(1, 3), max_group=6)
    engine, ids = decoder(tiny.model("llama"), plan), tiny.token_ids(20, seed)
    assert_same_run(run_whole(engine, ids), run_steps(engine, ids))


@pytest.mark.slow
@settings(max_examples=80)
@given(plan=fusing_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_any_plan_any_chunking(plan: Plan, family: str, length: int, data: st.DataObject) -> None:
    engine, ids = decoder(tiny.model(family), plan, special_ids=[7]), tiny.token_ids(length, seed=length)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=5)))
    chunks = [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
    whole = run_chunks(engine, ids, [length], prompt=True)
    assert_same_run(whole, run_chunks(engine, ids, chunks, prompt=True))


@settings(max_examples=40)
@given(plan=skipping_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_any_plan_whose_attention_skips_any_chunking(plan: Plan, family: str, length: int, data: st.DataObject) -> None:
    engine, ids = decoder(tiny.model(family, torch.float64), plan, special_ids=[7]), tiny.token_ids(length, seed=length)
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
    dropped = isinstance(plan.kv, rules.DropFill) and plan.halting is not None
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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("weights", get_args(rules.FusionWeights))
def test_prefill_equals_decode_in_bfloat16(family: str, weights: rules.FusionWeights) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]()).bfloat16()
    engine = decoder(model, fusion_plan(rules.RandomFusionRule(0.6, seed=2), layers=(1, 2), weights=weights))
    ids = tiny.token_ids(24)
    whole, steps = run_whole(engine, ids), run_steps(engine, ids, prompt=9)
    for layer_idx in range(4):
        assert torch.equal(*(run.cache.entries(layer_idx, 0).positions for run in (whole, steps)))
    assert whole.cache.entries(3, 0).keys.dtype == torch.bfloat16
    error = (whole.logits[-1].float() - steps.logits[-1].float()).abs().max() / whole.logits[-1].float().abs().max()
    assert error < tolerances.LOGITS[torch.bfloat16]


@pytest.mark.parametrize("flags", [[True], [True, False, True]], ids=str)
def test_a_wrong_number_of_prompt_flags_is_refused_and_spoils_nothing(flags: list[bool]) -> None:
    engine, ids = decoder(tiny.model("gpt2"), PLANS["one layer"]), tiny.token_ids(8)
    cache = engine.new_cache(2)
    with pytest.raises(InputError, match=f"prompt has {len(flags)} flags for 2 sequences"):
        engine.run(ids, [5, 3], cache, engine.new_trace(), prompt=flags)
    engine.run(ids, [5, 3], cache, engine.new_trace(), prompt=[True, False])


def test_what_halts_at_random_does_not_say_what_fuses() -> None:
    plan = fusion_plan(rules.RandomFusionRule(0.3, 1), rules.RandomRule(0.3, 1), rules.PropagateFill())
    trace = run_whole(decoder(tiny.model("gpt2"), plan), tiny.token_ids(60)).trace
    assert trace.layers[0].halted > 5
    assert trace.layers[0].fused > 5
