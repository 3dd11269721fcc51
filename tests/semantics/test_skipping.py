"""Keys and values that weigh little are left out in two steps: the rest equals its definition.

Runs that are compared with another way of computing the same are in float64, where nothing is so near its threshold
that rounding decides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from quicksilver import rules
from quicksilver.errors import PlanError
from quicksilver.families.cost import dense_cost, executed_cost
from quicksilver.ops import attention, ragged_attention
from quicksilver.ops.attention import Attended
from quicksilver.plan import Plan
from tests import oracle, tiny, tolerances
from tests.engines import (
    FILLS,
    decoder,
    dense_pairs,
    fusion_plan,
    halting_plan,
    run_batch,
    run_chunks,
    run_steps,
    run_whole,
    skipping_plan,
    with_kv,
)
from tests.strategies import skipping_plans

LIMITS = (0.9, 0.0, 0.3, 1.0)
PLANS = {
    "one threshold": skipping_plan(0.5),
    "layer by layer": skipping_plan(LIMITS),
    "few components first": skipping_plan(LIMITS, estimate_dims_above=1.7),
    "most components first": skipping_plan(LIMITS, estimate_dims_above=0.3),
    "all components first": skipping_plan(LIMITS, estimate_dims_above=0.0),
    "no component first": skipping_plan(0.9, estimate_dims_above=100.0),
    "coded": with_kv(skipping_plan(0.7), bits=8),
    "halves": with_kv(skipping_plan(0.7), bits=16),
}
COUNTS = ("values_skipped", "scores_skipped", "scored_twice")
ATOL = tolerances.LOGITS[torch.float64]
LENGTH = 40


def check(name: str, seed: int, plan: Plan, halts=oracle.never, fusion: oracle.Fusion | None = None) -> None:
    model, ids, kv = tiny.model(name, torch.float64), tiny.token_ids(LENGTH, seed), plan.kv
    limits = [rules.threshold_at(kv.skip_below, i) for i in range(4)]
    run = run_whole(decoder(model, plan), ids)
    expected = oracle.run(
        model,
        ids,
        kv.fill,
        halts,
        fusion,
        skip_below=limits,
        estimate_dims_above=kv.estimate_dims_above,
        entry_bits=kv.bits,
    )
    assert torch.equal(run.trace.depths[0], expected.depths)
    layers = run.trace.layers
    assert [layer.attended for layer in layers] == expected.attended
    assert [layer.values_skipped for layer in layers] == expected.skipped
    assert [layer.scores_skipped for layer in layers] == expected.unscored
    assert [layer.scored_twice for layer in layers] == expected.again
    assert [skipped > 0 for skipped in expected.skipped] == [limit > 0 for limit in limits]
    torch.testing.assert_close(run.logits, expected.logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("name", "plan"), tiny.on_telling(PLANS, ("layer by layer", "coded"), [*tiny.FAMILIES, *tiny.MORE])
)
def test_it_equals_the_oracle(name: str, plan: str) -> None:
    check(name, 0, PLANS[plan])


@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("name", tiny.TELLING)
def test_with_halting_it_equals_the_oracle(name: str, fill: rules.FillRule) -> None:
    depths = torch.randint(1, 6, (LENGTH,), generator=torch.Generator().manual_seed(3))
    plan = skipping_plan(0.7, halting_plan(rules.ForcedRule(tuple(depths.tolist())), fill))
    check(name, 1, plan, lambda layer_idx, *_: depths <= layer_idx + 1)


@pytest.mark.parametrize("fill", [None, *FILLS], ids=lambda f: "no halting" if f is None else type(f).__name__)
@pytest.mark.parametrize("name", tiny.TELLING)
def test_with_fusion_a_groups_mass_counts_in_both_steps(name: str, fill: rules.FillRule | None) -> None:
    generator = torch.Generator().manual_seed(7)
    joins = tuple((torch.rand(LENGTH, generator=generator) < 0.7).tolist())
    depths = torch.randint(1, 6, (LENGTH,), generator=generator)
    halting = None if fill is None else rules.ForcedRule(tuple(depths.tolist()))
    plan = skipping_plan(0.7, fusion_plan(rules.ForcedFusionRule(joins), halting, fill, layers=(1, 2), weights="mass"))
    fusion = oracle.Fusion((0, 1), 3, "mass", lambda layer_idx, hidden, earlier, later: joins[later])
    halts = oracle.never if fill is None else lambda layer_idx, *_: depths <= layer_idx + 1
    check(name, 5, plan, halts, fusion)


@pytest.mark.parametrize("threshold", [0.0, (0.0,) * 4], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_at_threshold_0_it_is_dense_bit_for_bit(family: str, threshold: rules.Threshold) -> None:
    ids = tiny.token_ids(20)
    for feed in (run_whole, run_steps):
        dense, run = (feed(decoder(tiny.model(family), plan), ids) for plan in (Plan.dense(), skipping_plan(threshold)))
        assert torch.equal(run.logits, dense.logits)
        assert run.trace.values_read(4) == run.trace.query_components_read(4, 8) == 1.0
        assert all(not layer.signal_rows and layer.scored_twice == 0 for layer in run.trace.layers)


@pytest.mark.parametrize("large", [0.0, 1.0, 1e300])
@pytest.mark.parametrize("threshold", [5e-324, 1e-30])
def test_a_threshold_that_skips_nothing_changes_nothing_but_by_rounding(threshold: float, large: float) -> None:
    for family in tiny.FAMILIES:
        model, ids = tiny.model(family, torch.float64), tiny.token_ids(20)
        engine = decoder(model, skipping_plan(threshold, estimate_dims_above=large))
        dense, run = run_whole(decoder(model, Plan.dense()), ids), run_whole(engine, ids)
        torch.testing.assert_close(run.logits, dense.logits, atol=ATOL, rtol=0)
        assert run.trace.values_read(4) == run.trace.query_components_read(4, 8) == 1.0
        assert [layer.scored_twice for layer in run.trace.layers] == [4 * n for n in dense_pairs(engine, 20)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_at_threshold_1_every_head_reads_a_value_but_not_all(family: str) -> None:
    run = run_whole(decoder(tiny.model(family), skipping_plan(1.0)), tiny.token_ids(LENGTH))
    assert run.logits.isfinite().all()
    for layer in run.trace.layers:
        kept = layer.attended * 4 - layer.values_skipped
        assert LENGTH * 4 <= kept <= layer.scored_twice < layer.attended * 4 * 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_of_equal_weights_all_are_kept(dtype: torch.dtype) -> None:
    """Each is 1 / n but for rounding, at which the threshold lies too."""
    values = torch.randn(99, 1, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for n in range(1, 100):
        query, keys, positions = torch.zeros(1, 2, 4, dtype=dtype), values.new_ones(n, 1, 4), torch.arange(n)
        got = ragged_attention(query, keys, values[:n], positions[-1:], positions, 1.0, True, skip_below=1.0)
        assert (got.pairs, [int(count) for count in got.skipped]) == (n, [0, 0, 2 * n])
        torch.testing.assert_close(got.output[0, 0], values[:n, 0].mean(0), atol=tolerances.LOGITS[dtype], rtol=0)


def test_values_by_hand() -> None:
    """Four keys weigh 0.7, 0.2, 0.06 and 0.04 for one head and are alike for the other; the values are unit vectors.

    The one component that is not zero is large, so that the first step estimates what the second finds.
    """
    weights = torch.tensor([0.7, 0.2, 0.06, 0.04])
    keys, values = weights.log()[:, None, None].expand(4, 1, 4), torch.eye(4)[:, None, :]
    query, positions = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0] * 4]]), torch.arange(4)

    def attend(position: int, skip_below: float, newest: bool = False, masses: Tensor | None = None) -> Any:
        out, pairs, skipped, _ = ragged_attention(
            query, keys, values, positions[[position]], positions, 1.0, newest, masses=masses, skip_below=skip_below
        )
        assert int(out[0, 1].count_nonzero()) == int(pairs) == position + 1
        assert int(skipped.scores) == 3 * int(skipped.values)
        return pytest.approx(out[0, 0].tolist()), int(skipped.values)

    for newest in (True, False):
        assert attend(3, 0.4, newest) == ([7 / 9, 2 / 9, 0, 0], 2)  # below 0.1
        assert attend(3, 0.2, newest) == ([70 / 96, 20 / 96, 6 / 96, 0], 1)  # below 0.05
        masses = torch.tensor([1, 1, 1, 4])  # 0.625, 0.179, 0.054, 0.143; still four entries
        assert attend(3, 0.3, newest, masses) == ([70 / 106, 20 / 106, 0, 16 / 106], 1)  # below 0.075
    assert attend(2, 0.2) == ([7 / 9, 2 / 9, 0, 0], 1)  # of three keys the last weighs 0.0625, less than 0.2 / 3
    assert attend(1, 0.5) == ([1, 0, 0, 0], 1)  # of two the last weighs 0.222


def test_both_steps_by_hand() -> None:
    """Of a query (3, 1) the first component is large: four keys are estimated to weigh 8, 4, 2 and 1 fifteenths.

    The others then weigh 8, 4 times 2 and 2 times 1/16 of their sum, the last one next to nothing.
    """
    query, positions = torch.tensor([[[3.0, 1.0]]]), torch.arange(4)
    estimates, factors = torch.tensor([8.0, 4.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1 / 16, 1e9])
    keys, values = torch.stack((estimates.log() / 3, factors.log()), -1)[:, None, :], torch.eye(4)[:, None, :]
    values = values[..., :2].contiguous()
    values[2:] = torch.tensor([[5.0, 0.0], [0.0, 5.0]])[:, None]

    def attend(skip_below: float, newest: bool, large: float = 1.0) -> Any:
        options = {"skip_below": skip_below, "estimate_dims_above": large}
        got = ragged_attention(query, keys, values, positions[3:], positions, 1.0, newest, **options)
        return pytest.approx(got.output[0, 0].tolist(), rel=1e-5), tuple(map(int, got.skipped))

    for newest in (True, False):
        # Below 0.075 the last is left out; of 16.125 the third weighs 0.0078.
        assert attend(0.3, newest) == ([0.5, 0.5], (2, 1, 3))
        # Below 0.15 the third is not scored again.
        assert attend(0.6, newest) == ([0.5, 0.5], (2, 2, 2))
        # Below 0.005 all are scored again, and the last is almost all there is.
        assert attend(0.02, newest) == ([pytest.approx(0.0, abs=1e-6), 5.0], (3, 0, 4))
        # Of all components the first step knows so.
        assert attend(0.6, newest, 0.0) == ([pytest.approx(0.0, abs=1e-6), 5.0], (3, 0, 1))


@pytest.mark.parametrize("masses", [False, True])
def test_a_block_of_queries_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch, masses: bool) -> None:
    """Of the newest tokens, of some of them, and of a chunk after others."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(20, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    counts, positions = torch.randint(1, 4, (20,), generator=generator), torch.arange(20)
    for rows, newest in ((positions, True), (positions[::3], False), (positions[6:], True)):

        def attend(rows: Tensor = rows, newest: bool = newest) -> Attended:
            mass = counts if masses else None
            return ragged_attention(
                queries[rows], keys, values, rows, positions, 0.5, newest, masses=mass, skip_below=0.7
            )

        whole = attend()
        monkeypatch.setattr(attention, "_BLOCK", 5)
        blocks = attend()
        monkeypatch.undo()
        torch.testing.assert_close(blocks.output, whole.output, atol=ATOL, rtol=0)
        assert (int(blocks.pairs), blocks.entries) == (int(whole.pairs), whole.entries)
        assert [int(count) for count in blocks.skipped] == [int(count) for count in whole.skipped]
        assert min(int(count) for count in whole.skipped) > 0


@pytest.mark.slow
@settings(max_examples=40)
@given(plan=skipping_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_prefill_equals_decode_equals_chunks(plan: Plan, family: str, length: int, data: st.DataObject) -> None:
    """The same is skipped too; plans that fuse are compared with the others of their kind."""
    engine = decoder(tiny.model(family, torch.float64), replace(plan, fusion=None), special_ids=[7])
    ids, cut = tiny.token_ids(length, seed=length), data.draw(st.integers(1, length - 1))
    whole = run_whole(engine, ids)
    for parts in (run_steps(engine, ids), run_chunks(engine, ids, [cut, length - cut])):
        torch.testing.assert_close(whole.logits, parts.logits, atol=ATOL, rtol=0)
        assert executed_cost(engine.spec, whole.trace) == executed_cost(engine.spec, parts.trace)
        for one, other in zip(whole.trace.layers, parts.trace.layers, strict=True):
            assert all(getattr(one, name) == getattr(other, name) for name in COUNTS)


@settings(max_examples=20)
@given(plan=skipping_plans, family=st.sampled_from(tiny.FAMILIES), lengths=st.lists(st.integers(1, 20), min_size=2))
def test_a_batch_equals_its_sequences_alone(plan: Plan, family: str, lengths: list[int]) -> None:
    engine = decoder(tiny.model(family, torch.float64), plan)
    sequences = [tiny.token_ids(n, seed=n) for n in lengths[:4]]
    batch, alone = run_batch(engine, sequences), [run_whole(engine, ids) for ids in sequences]
    torch.testing.assert_close(batch.logits, torch.cat([run.logits for run in alone]), atol=ATOL, rtol=0)
    for layer_idx, layer in enumerate(batch.trace.layers):
        each = [run.trace.layers[layer_idx] for run in alone]
        assert all(getattr(layer, name) == sum(getattr(one, name) for one in each) for name in COUNTS)


@pytest.mark.parametrize("family", tiny.LAYOUTS)
@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
def test_prefill_equals_decode_in_bfloat16(family: str, fill: rules.FillRule) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]()).bfloat16()
    plan = skipping_plan(0.5, halting_plan(rules.RandomRule(0.35, seed=2), fill))
    engine, ids = decoder(model, plan), tiny.token_ids(24)
    whole, steps = (run.logits.float() for run in (run_whole(engine, ids), run_steps(engine, ids, prompt=9)))
    assert (whole - steps).abs().max() / whole.abs().max() < tolerances.LOGITS[torch.bfloat16]


@pytest.mark.parametrize(("family", "coded"), tiny.on_telling((False, True), everywhere=(True,)))
def test_flops_fall_by_what_is_skipped_and_rise_by_what_that_takes(family: str, coded: bool) -> None:
    """Squares of queries and a softmax in three of four layers; of coded entries scales, once more for second steps.

    PyTorch's counter sees the plain products of both steps, all of them, and neither squares nor softmax.
    """
    plan, ids = with_kv(skipping_plan((0.5, 0.0, 0.8, 1.0)), bits=8 if coded else None), tiny.token_ids(20)
    engine = decoder(tiny.model(family), plan, attention="eager")
    with FlopCounterMode(display=False) as counter:
        spec, trace = engine.spec, run_steps(engine, ids).trace
    cost, dense = executed_cost(spec, trace), dense_cost(spec, trace)
    values, components, again = ([getattr(layer, name) for layer in trace.layers] for name in COUNTS)
    pairs = [4 * n for n in dense_pairs(engine, 20)]  # heads
    for counts in (values, components, again):
        assert counts[1] == 0 < min(counts[0], *counts[2:])
    skipped, scales = sum(values) * spec.head_dim + sum(components), 0
    estimates = 3 * 20 * 4 * spec.head_dim + sum(pairs) - pairs[1]
    if coded:
        scales = 2 * sum(pairs) - sum(values) + sum(again) + 4 * 20 * 4 * spec.num_kv_heads * spec.head_dim
    assert cost.flops // 2 == dense.flops // 2 - skipped + estimates + scales
    products = 2 * sum(pairs) * spec.head_dim - skipped
    weights = dense.flops // 2 - 2 * sum(pairs) * spec.head_dim
    assert cost.bitops == 32 * (32 * (weights + estimates + scales) + (8 if coded else 32) * products)
    assert cost.weight_bytes == dense.weight_bytes
    assert counter.get_total_flops() == dense.flops + 2 * (sum(pairs) - pairs[1]) * spec.head_dim
    assert trace.values_read(4) == pytest.approx(1 - sum(values) / sum(pairs))
    read = 1 - sum(components) / sum(pairs) / spec.head_dim
    assert trace.query_components_read(4, spec.head_dim) == pytest.approx(read)


def test_thresholds_for_another_depth_are_refused() -> None:
    with pytest.raises(PlanError, match="3 thresholds, the model has 4 layers"):
        decoder(tiny.model("gpt2"), skipping_plan((0.1,) * 3))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_counts_stay_in_their_bounds_whatever_the_numbers(wrong: float) -> None:
    keys, positions = torch.randn(6, 2, 4), torch.arange(6)
    keys[1, 0] = wrong
    tensors = torch.randn(6, 4, 4), keys, torch.randn(6, 2, 4), positions, positions
    done = ragged_attention(*tensors, 1.0, True, skip_below=0.5)
    values, scores, twice = map(int, done.skipped)
    pairs = 4 * int(done.pairs)
    assert 0 <= values <= pairs
    assert 0 <= twice <= pairs
    assert 0 <= scores <= 4 * (pairs - twice)
