"""One meaning however it is fed: prefill, decode, chunks, batches; and the caches come out the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quicksilver.cache import RaggedKVCache
from quicksilver.plan import Plan
from quicksilver.rules import FillRule, ForcedRule, PropagateFill, RandomRule
from tests import tiny, tolerances
from tests.engines import FILLS, Run, decoder, halting_plan, run_batch, run_chunks, run_steps, run_whole
from tests.strategies import plans

ATOL = tolerances.LOGITS[torch.float32]
QUICK = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same_cache(first: RaggedKVCache, second: RaggedKVCache, seqs: tuple[int, int] = (0, 0)) -> None:
    for layer_idx in range(first.shape.num_layers):
        one, other = first.entries(layer_idx, seqs[0]), second.entries(layer_idx, seqs[1])
        assert torch.equal(one.positions, other.positions)
        torch.testing.assert_close(one.keys, other.keys, atol=ATOL, rtol=0)
        torch.testing.assert_close(one.values, other.values, atol=ATOL, rtol=0)


def assert_same_run(one: Run, other: Run) -> None:
    torch.testing.assert_close(one.logits, other.logits, atol=ATOL, rtol=0)
    assert torch.equal(torch.cat(one.trace.depths), torch.cat(other.trace.depths))
    assert_same_cache(one.cache, other.cache)


@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefill_equals_decode_equals_chunks(family: str, fill: FillRule) -> None:
    engine = decoder(tiny.model(family), halting_plan(RandomRule(0.35, seed=2), fill))
    ids = tiny.token_ids(33)
    whole = run_whole(engine, ids)
    assert 1.0 < whole.trace.mean_depth < 4.0
    assert_same_run(whole, run_steps(engine, ids))
    assert_same_run(whole, run_steps(engine, ids, prompt=20))
    assert_same_run(whole, run_chunks(engine, ids, [4, 1, 13, 15]))


@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_batch_of_unequal_prompts_equals_each_alone(family: str, fill: FillRule) -> None:
    engine = decoder(tiny.model(family), halting_plan(RandomRule(0.35, seed=4), fill))
    sequences = [tiny.token_ids(n, seed=n) for n in (11, 1, 30, 2)]
    batch = run_batch(engine, sequences)
    for seq, (ids, logits) in enumerate(zip(sequences, batch.logits.split([11, 1, 30, 2]), strict=True)):
        alone = run_whole(engine, ids)
        torch.testing.assert_close(logits, alone.logits, atol=ATOL, rtol=0)
        assert_same_cache(batch.cache, alone.cache, (seq, 0))


@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefill_equals_decode_in_bfloat16(family: str, fill: FillRule) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]()).bfloat16()
    engine, ids = decoder(model, halting_plan(RandomRule(0.35, seed=2), fill)), tiny.token_ids(24)
    whole, steps = run_whole(engine, ids), run_steps(engine, ids, prompt=9)
    assert torch.equal(torch.cat(whole.trace.depths), torch.cat(steps.trace.depths))
    error = (whole.logits.float() - steps.logits.float()).abs().max() / whole.logits.float().abs().max()
    assert error < tolerances.LOGITS[torch.bfloat16]


def test_a_batch_whose_sequences_advance_unevenly() -> None:
    """Continuous batching's case: one sequence decodes while another is still prefilling or waits."""
    engine = decoder(tiny.model("llama"), halting_plan(ForcedRule((1, 3, 2, 4)), PropagateFill()))
    first, second = tiny.token_ids(12, 1), tiny.token_ids(20, 2)
    cache, trace = engine.new_cache(2), engine.new_trace()
    got = [[], []]
    for ends in ((5, 1), (5, 9), (6, 10), (12, 10), (12, 20)):
        chunk = [first[cache.seq_lengths[0] : ends[0]], second[cache.seq_lengths[1] : ends[1]]]
        lengths = [len(c) for c in chunk]
        hidden = engine.run(torch.cat(chunk), lengths, cache, trace)
        for seq, rows in enumerate(engine.logits(hidden, trace).split(lengths)):
            got[seq].append(rows)
    for ids, logits in zip((first, second), got, strict=True):
        torch.testing.assert_close(torch.cat(logits), run_whole(engine, ids).logits, atol=ATOL, rtol=0)


@QUICK
@given(plan=plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_any_plan_any_chunking(plan: Plan, family: str, length: int, data: st.DataObject) -> None:
    engine, ids = decoder(tiny.model(family), plan, special_ids=[7]), tiny.token_ids(length, seed=length)
    cut = data.draw(st.integers(1, length - 1))
    whole, parts = run_whole(engine, ids), run_chunks(engine, ids, [cut, length - cut])
    assert_same_run(whole, parts)


def test_halting_nothing_is_dense_bit_for_bit() -> None:
    for family in tiny.FAMILIES:
        ids = tiny.token_ids(20)
        dense = run_whole(decoder(tiny.model(family), Plan.dense()), ids)
        for fill in FILLS:
            run = run_whole(decoder(tiny.model(family), halting_plan(RandomRule(0.0), fill)), ids)
            assert torch.equal(run.logits, dense.logits)


def test_every_sequence_may_halt_everything_at_once() -> None:
    for fill in FILLS:
        engine = decoder(tiny.model("gpt2"), halting_plan(ForcedRule((1,)), fill))
        run = run_batch(engine, [tiny.token_ids(3), tiny.token_ids(5)])
        assert run.trace.mean_depth == 1.0
        assert [layer.query_rows for layer in run.trace.layers] == [8, 0, 0, 0]
