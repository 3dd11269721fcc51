"""Scores in two steps: keys that a query's large components rule out weigh nothing; the rest equals its definition.

Runs that are compared with another way of computing the same are in float64, where nothing is so near its threshold
that rounding decides.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quicksilver import rules
from quicksilver.errors import PlanError
from quicksilver.families.cost import dense_cost, executed_cost
from quicksilver.ops import Screen, attention, ragged_attention
from quicksilver.ops.attention import Attended
from quicksilver.plan import Plan
from tests import oracle, tiny, tolerances
from tests.engines import (
    decoder,
    dense_pairs,
    fusion_plan,
    halting_plan,
    run_batch,
    run_chunks,
    run_steps,
    run_whole,
    screening_plan,
    skipping_plan,
    with_kv,
)
from tests.strategies import screening_plans

FILLS = (rules.DropFill(), rules.ZeroFill(), rules.PropagateFill())
FAMILIES = [*tiny.FAMILIES, *tiny.MORE]
PLANS = {
    "alone": screening_plan(0.5),
    "layer by layer": screening_plan((0.9, 0.0, 3.0, 20.0), (1.0, 1.0, 0.5, 1.5)),
    "with values": screening_plan(0.5, plan=skipping_plan((0.9, 0.0, 0.3, 1.0))),
    "with queries": screening_plan(0.5, plan=skipping_plan(0.0, query_threshold=(0.7, 0.0, 1.3, 1.0))),
    "with both, coded": screening_plan(1.0, plan=with_kv(skipping_plan(0.4, query_threshold=0.4), bits=8)),
}
ATOL = tolerances.LOGITS[torch.float64]
LENGTH = 40


def check(name: str, seed: int, plan: Plan, halts=oracle.never, fusion: oracle.Fusion | None = None) -> None:
    model, ids, kv = tiny.model(name, torch.float64), tiny.token_ids(LENGTH, seed), plan.kv
    limits = [rules.threshold_at(kv.screen_keys_below, i) for i in range(4)]
    run = run_whole(decoder(model, plan), ids)
    expected = oracle.run(
        model,
        ids,
        plan.kv.fill,
        halts,
        fusion,
        skip_below=[rules.threshold_at(kv.skip_values_below, i) for i in range(4)],
        query_below=[rules.threshold_at(kv.drop_query_dims_below, i) for i in range(4)],
        entry_bits=kv.bits,
        screen=[(limits[i], rules.threshold_at(kv.screen_query_dims_below, i)) for i in range(4)],
    )
    assert torch.equal(run.trace.depths[0], expected.depths)
    layers = run.trace.layers
    assert [layer.attended for layer in layers] == expected.attended
    assert [layer.values_skipped for layer in layers] == expected.skipped
    assert [layer.scores_skipped for layer in layers] == expected.unscored
    screened = [layer.scored_twice for i, layer in enumerate(layers) if limits[i] > 0]
    assert screened == expected.again
    assert sum(expected.again) < 4 * sum(expected.attended)
    torch.testing.assert_close(run.logits, expected.logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_equals_the_oracle(name: str, plan: Plan) -> None:
    check(name, 0, plan)


@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_with_halting_it_equals_the_oracle(name: str, fill: rules.FillRule) -> None:
    depths = torch.randint(1, 6, (LENGTH,), generator=torch.Generator().manual_seed(3))
    plan = screening_plan(0.7, plan=halting_plan(rules.ForcedRule(tuple(depths.tolist())), fill))
    check(name, 1, plan, lambda layer_idx, *_: depths <= layer_idx + 1)


@pytest.mark.parametrize("fill", [None, *FILLS], ids=lambda f: "no halting" if f is None else type(f).__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_with_fusion_a_groups_mass_counts_in_both_steps(name: str, fill: rules.FillRule | None) -> None:
    generator = torch.Generator().manual_seed(7)
    joins = tuple((torch.rand(LENGTH, generator=generator) < 0.7).tolist())
    depths = torch.randint(1, 6, (LENGTH,), generator=generator)
    halting = None if fill is None else rules.ForcedRule(tuple(depths.tolist()))
    plan = screening_plan(
        0.7, plan=fusion_plan(rules.ForcedFusionRule(joins), halting, fill, layers=(1, 2), weights="mass")
    )
    fusion = oracle.Fusion((0, 1), 3, "mass", lambda layer_idx, hidden, earlier, later: joins[later])
    halts = oracle.never if fill is None else lambda layer_idx, *_: depths <= layer_idx + 1
    check(name, 5, plan, halts, fusion)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_at_threshold_0_it_is_dense_bit_for_bit(family: str) -> None:
    ids = tiny.token_ids(20)
    for feed in (run_whole, run_steps):
        dense, run = (feed(decoder(tiny.model(family), plan), ids) for plan in (Plan.dense(), screening_plan(0.0)))
        assert torch.equal(run.logits, dense.logits)
        assert all(not layer.signal_rows and layer.scored_twice == 0 for layer in run.trace.layers)


@pytest.mark.parametrize("large", [0.0, 1.0, 1e300])
@pytest.mark.parametrize("threshold", [5e-324, 1e-30])
def test_a_threshold_that_screens_nothing_changes_nothing_but_by_rounding(threshold: float, large: float) -> None:
    for family in tiny.FAMILIES:
        model, ids = tiny.model(family, torch.float64), tiny.token_ids(20)
        engine = decoder(model, screening_plan(threshold, large))
        dense, run = run_whole(decoder(model, Plan.dense()), ids), run_whole(engine, ids)
        torch.testing.assert_close(run.logits, dense.logits, atol=ATOL, rtol=0)
        assert run.trace.values_read(4) == run.trace.query_components_read(4, 8) == 1.0
        assert [layer.scored_twice for layer in run.trace.layers] == [4 * n for n in dense_pairs(engine, 20)]


def test_at_the_largest_threshold_every_query_keeps_a_key() -> None:
    run = run_whole(decoder(tiny.model("llama", torch.float64), screening_plan(1e300)), tiny.token_ids(LENGTH))
    assert run.logits.isfinite().all()
    assert all(layer.scored_twice == 4 * LENGTH for layer in run.trace.layers)


def test_by_hand() -> None:
    """Of a query (3, 1) the first component is large: by it four keys weigh 1, e^-1, e^-2 and e^-3 of the largest."""
    query = torch.tensor([[[3.0, 1.0]]])
    firsts, seconds = torch.tensor([0.0, -1 / 3, -2 / 3, -1.0]), torch.tensor([0.0, 2.0, 5.0, 9.0])
    keys, values = torch.stack((firsts, seconds), -1)[:, None, :], torch.eye(4)[:, None, :2].contiguous()
    positions = torch.arange(4)
    for newest in (True, False):
        for below, left in ((4 * 0.3, 2), (4 * 0.1, 3), (4 * 0.01, 4), (400.0, 1)):
            got = ragged_attention(
                query, keys, values, positions[3:], positions, 1.0, newest, screen=Screen(below, 1.0)
            )
            scores = (torch.arange(4) * -1.0 + seconds)[:left]
            weights = torch.softmax(scores, 0)
            torch.testing.assert_close(got.output[0, 0], (weights[:, None] * values[:left, 0]).sum(0))
            counts = int(got.values_skipped), int(got.scores_skipped), int(got.scored_twice)
            assert counts == (4 - left, 4 - left, left)


@pytest.mark.parametrize("masses", [False, True])
@pytest.mark.parametrize("screen", [None, Screen(0.5, 1.0)])
def test_a_block_of_queries_at_a_time_is_the_same(
    monkeypatch: pytest.MonkeyPatch, screen: Screen | None, masses: bool
) -> None:
    """Of the newest tokens, of some of them, and of a chunk after others."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(20, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    counts, positions = torch.randint(1, 4, (20,), generator=generator), torch.arange(20)
    for rows, newest in ((positions, True), (positions[::3], False), (positions[6:], True)):

        def attend(rows: Tensor = rows, newest: bool = newest) -> Attended:
            return ragged_attention(
                queries[rows],
                keys,
                values,
                rows,
                positions,
                0.5,
                newest,
                masses=counts if masses else None,
                skip_below=0.7,
                query_below=0.3,
                screen=screen,
            )

        whole = attend()
        monkeypatch.setattr(attention, "_BLOCK", 5)
        blocks = attend()
        monkeypatch.undo()
        torch.testing.assert_close(blocks.output, whole.output, atol=ATOL, rtol=0)
        assert [int(count) for count in blocks[1:]] == [int(count) for count in whole[1:]]
        assert int(whole.values_skipped) > 0 < int(whole.scores_skipped)


@settings(max_examples=40)
@given(plan=screening_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_prefill_equals_decode_equals_chunks(plan: Plan, family: str, length: int, data: st.DataObject) -> None:
    engine = decoder(tiny.model(family, torch.float64), replace(plan, fusion=None), special_ids=[7])
    ids, cut = tiny.token_ids(length, seed=length), data.draw(st.integers(1, length - 1))
    whole = run_whole(engine, ids)
    for parts in (run_steps(engine, ids), run_chunks(engine, ids, [cut, length - cut])):
        torch.testing.assert_close(whole.logits, parts.logits, atol=ATOL, rtol=0)
        assert executed_cost(engine.spec, whole.trace) == executed_cost(engine.spec, parts.trace)


@settings(max_examples=20)
@given(plan=screening_plans, family=st.sampled_from(tiny.FAMILIES), lengths=st.lists(st.integers(1, 20), min_size=2))
def test_a_batch_equals_its_sequences_alone(plan: Plan, family: str, lengths: list[int]) -> None:
    engine = decoder(tiny.model(family, torch.float64), plan)
    sequences = [tiny.token_ids(n, seed=n) for n in lengths[:4]]
    batch, alone = run_batch(engine, sequences), [run_whole(engine, ids) for ids in sequences]
    torch.testing.assert_close(batch.logits, torch.cat([run.logits for run in alone]), atol=ATOL, rtol=0)
    for layer_idx, layer in enumerate(batch.trace.layers):
        assert layer.scored_twice == sum(run.trace.layers[layer_idx].scored_twice for run in alone)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefill_equals_decode_in_bfloat16(family: str) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]()).bfloat16()
    engine, ids = decoder(model, screening_plan(0.5)), tiny.token_ids(24)
    whole, steps = (run.logits.float() for run in (run_whole(engine, ids), run_steps(engine, ids, prompt=9)))
    assert (whole - steps).abs().max() / whole.abs().max() < tolerances.LOGITS[torch.bfloat16]


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flops_fall_by_what_is_screened_and_rise_by_what_that_takes(family: str, coded: bool) -> None:
    """Squares of queries in three of four layers; where entries are coded, their scales, once more for second steps."""
    plan, ids = screening_plan((0.5, 0.0, 3.0, 20.0)), tiny.token_ids(20)
    engine = decoder(tiny.model(family), with_kv(plan, bits=8 if coded else None))
    spec, trace = engine.spec, run_steps(engine, ids).trace
    cost, dense = executed_cost(spec, trace), dense_cost(spec, trace)
    values, components, again = (
        [getattr(layer, name) for layer in trace.layers]
        for name in ("values_skipped", "scores_skipped", "scored_twice")
    )
    pairs = [4 * n for n in dense_pairs(engine, 20)]
    assert values == [of_layer - n if n else 0 for n, of_layer in zip(again, pairs, strict=True)]
    shares = [value / of_layer for value, of_layer in zip(values, pairs, strict=True)]
    assert shares[1] == components[1] == 0 < shares[0] < shares[2] < shares[3]
    added = 3 * 20 * 4 * spec.head_dim
    if coded:
        added += 2 * sum(pairs) - sum(values) + sum(again) + 4 * 20 * 4 * spec.num_kv_heads * spec.head_dim
    assert cost.flops // 2 == dense.flops // 2 - sum(values) * spec.head_dim - sum(components) + added


def test_thresholds_for_another_depth_are_refused() -> None:
    for plan in (screening_plan((0.1,) * 3), screening_plan(0.1, (1.0,) * 3)):
        with pytest.raises(PlanError, match="3 thresholds, the model has 4 layers"):
            decoder(tiny.model("gpt2"), plan)
