"""Values that weigh little, and small components of queries, are left out: the rest equals its definition.

Runs that are compared with another way of computing the same are in float64, where nothing is so near its threshold
that rounding decides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from quicksilver import rules
from quicksilver.errors import PlanError
from quicksilver.families.cost import dense_cost, executed_cost
from quicksilver.ops import Screen, ragged_attention
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
    skipping_plan,
)
from tests.strategies import skipping_plans

FILLS = (rules.DropFill(), rules.ZeroFill(), rules.PropagateFill())
THRESHOLDS = {
    "values": (0.5, 0.0),
    "values layer by layer": ((0.9, 0.0, 0.3, 1.0), 0.0),
    "queries": (0.0, 0.4),
    "queries layer by layer": (0.0, (0.5, 0.0, 2.0, 1.0)),
    "both": ((0.0, 0.5, 0.5, 0.0), (0.7, 0.0, 0.7, 0.0)),
}
"""Of values, and of queries' components."""
EITHER = pytest.mark.parametrize(("threshold", "query_threshold"), [(0.6, 0.0), (0.0, 0.7)], ids=["values", "queries"])
FAMILIES = [*tiny.FAMILIES, *tiny.MORE]
ATOL = tolerances.LOGITS[torch.float64]
LENGTH = 40


def check(name: str, ids: torch.Tensor, plan: Plan, halts=oracle.never, fusion: oracle.Fusion | None = None) -> None:
    model, kv = tiny.model(name, torch.float64), plan.kv
    below = kv.skip_values_below, kv.drop_query_dims_below
    limits, query_limits = ([rules.threshold_at(each, i) for i in range(4)] for each in below)
    run = run_whole(decoder(model, plan), ids)
    expected = oracle.run(model, ids, plan.kv.fill, halts, fusion, skip_below=limits, query_below=query_limits)
    assert torch.equal(run.trace.depths[0], expected.depths)
    assert [layer.attended for layer in run.trace.layers] == expected.attended
    assert [layer.values_skipped for layer in run.trace.layers] == expected.skipped
    assert [layer.scores_skipped for layer in run.trace.layers] == expected.unscored
    assert [skipped > 0 for skipped in expected.skipped] == [limit > 0 for limit in limits]
    assert [skipped > 0 for skipped in expected.unscored] == [limit > 0 for limit in query_limits]
    torch.testing.assert_close(run.logits, expected.logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize(("threshold", "query_threshold"), THRESHOLDS.values(), ids=THRESHOLDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_alone_it_equals_the_oracle(name: str, threshold: rules.Threshold, query_threshold: rules.Threshold) -> None:
    check(name, tiny.token_ids(LENGTH), skipping_plan(threshold, query_threshold=query_threshold))


@EITHER
@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_with_halting_it_equals_the_oracle(
    name: str, fill: rules.FillRule, threshold: float, query_threshold: float
) -> None:
    depths = torch.randint(1, 6, (LENGTH,), generator=torch.Generator().manual_seed(3))
    plan = skipping_plan(threshold, halting_plan(rules.ForcedRule(tuple(depths.tolist())), fill), query_threshold)
    check(name, tiny.token_ids(LENGTH, 1), plan, lambda layer_idx, *_: depths <= layer_idx + 1)


@EITHER
@pytest.mark.parametrize("fill", [None, *FILLS], ids=lambda f: "no halting" if f is None else type(f).__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_with_fusion_a_groups_mass_counts_in_its_weight(
    name: str, fill: rules.FillRule | None, threshold: float, query_threshold: float
) -> None:
    generator = torch.Generator().manual_seed(7)
    joins = tuple((torch.rand(LENGTH, generator=generator) < 0.7).tolist())
    depths = torch.randint(1, 6, (LENGTH,), generator=generator)
    halting = None if fill is None else rules.ForcedRule(tuple(depths.tolist()))
    plan = fusion_plan(rules.ForcedFusionRule(joins), halting, fill, layers=(1, 2), weights="mass")
    plan = skipping_plan(threshold, plan, query_threshold)
    fusion = oracle.Fusion((0, 1), 3, "mass", lambda layer_idx, hidden, earlier, later: joins[later])
    halts = oracle.never if fill is None else lambda layer_idx, *_: depths <= layer_idx + 1
    check(name, tiny.token_ids(LENGTH, 5), plan, halts, fusion)


@pytest.mark.parametrize("threshold", [0.0, (0.0,) * 4], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_at_threshold_0_it_is_dense_bit_for_bit(family: str, threshold: rules.Threshold) -> None:
    ids = tiny.token_ids(20)
    for feed in (run_whole, run_steps):
        plans = (Plan.dense(), skipping_plan(threshold, query_threshold=threshold))
        dense, run = (feed(decoder(tiny.model(family), plan), ids) for plan in plans)
        assert torch.equal(run.logits, dense.logits)
        assert run.trace.values_read(4) == run.trace.query_components_read(4, 8) == 1.0
        assert all(not layer.signal_rows for layer in run.trace.layers)


@pytest.mark.parametrize("threshold", [1e-30, 5e-324])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_queries_of_which_nothing_is_left_out_are_dense_bit_for_bit(family: str, threshold: float) -> None:
    ids = tiny.token_ids(20)
    for feed in (run_whole, run_steps):
        plans = (Plan.dense(), skipping_plan(0.0, query_threshold=threshold))
        dense, run = (feed(decoder(tiny.model(family), plan), ids) for plan in plans)
        assert torch.equal(run.logits, dense.logits)
        assert run.trace.query_components_read(4, 8) == 1.0


@pytest.mark.parametrize("threshold", [100.0, 1e300])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_queries_of_which_nothing_is_left_weigh_all_values_alike(family: str, threshold: float) -> None:
    engine = decoder(tiny.model(family), skipping_plan(0.0, query_threshold=threshold))
    trace = run_whole(engine, tiny.token_ids(20)).trace
    assert trace.query_components_read(4, engine.spec.head_dim) == 0.0
    assert trace.values_read(4) == 1.0
    values, positions = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    attended = ragged_attention(values, values, values, positions, positions, 1.0, newest=True, query_below=threshold)
    means = values.cumsum(0) / (positions + 1)[:, None, None]
    torch.testing.assert_close(attended.output, means, atol=tolerances.LOGITS[torch.float32], rtol=0)


def test_at_threshold_0_attention_is_pytorchs_fused_one() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(50, 4, 16, generator=generator) for _ in range(3))
    expected = F.scaled_dot_product_attention(
        *(t.transpose(0, 1)[:, None] for t in (query, key, value)), is_causal=True
    )
    got = ragged_attention(query, key, value, torch.arange(50), torch.arange(50), 0.25, newest=True, skip_below=0.0)
    assert torch.equal(got.output, expected[:, 0].transpose(0, 1))
    assert (got.pairs, got.values_skipped, got.scores_skipped) == (50 * 51 // 2, 0, 0)


@pytest.mark.parametrize("threshold", [1e-30, 5e-324])
def test_a_threshold_that_skips_nothing_changes_nothing_but_by_rounding(threshold: float) -> None:
    for family in tiny.FAMILIES:
        engines = [
            decoder(tiny.model(family, torch.float64), plan) for plan in (Plan.dense(), skipping_plan(threshold))
        ]
        dense, run = (run_whole(engine, tiny.token_ids(20)) for engine in engines)
        torch.testing.assert_close(run.logits, dense.logits, atol=ATOL, rtol=0)
        assert run.trace.values_read(4) == 1.0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_at_threshold_1_every_head_reads_a_value_but_not_all(family: str) -> None:
    run = run_whole(decoder(tiny.model(family), skipping_plan(1.0)), tiny.token_ids(LENGTH))
    assert run.logits.isfinite().all()
    for layer in run.trace.layers:
        kept = layer.attended * 4 - layer.values_skipped
        assert LENGTH * 4 <= kept < layer.attended * 4 // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_of_equal_weights_all_are_kept(dtype: torch.dtype) -> None:
    """Each is 1 / n but for rounding, at which the threshold lies too."""
    values = torch.randn(99, 1, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for n in range(1, 100):
        query, keys, positions = torch.zeros(1, 2, 4, dtype=dtype), values.new_ones(n, 1, 4), torch.arange(n)
        out, pairs, skipped, *_ = ragged_attention(
            query, keys, values[:n], positions[-1:], positions, 1.0, True, skip_below=1.0
        )
        assert (pairs, int(skipped)) == (n, 0)
        torch.testing.assert_close(out[0, 0], values[:n, 0].mean(0), atol=tolerances.LOGITS[dtype], rtol=0)


def test_by_hand() -> None:
    """Four keys weigh 0.7, 0.2, 0.06 and 0.04 for one head and are alike for the other; the values are unit vectors."""
    weights = torch.tensor([0.7, 0.2, 0.06, 0.04])
    keys, values = weights.log()[:, None, None].expand(4, 1, 4), torch.eye(4)[:, None, :]
    query, positions = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0] * 4]]), torch.arange(4)

    def attend(position: int, skip_below: float, newest: bool = False, masses: torch.Tensor | None = None):
        out, pairs, skipped, *_ = ragged_attention(
            query, keys, values, positions[[position]], positions, 1.0, newest, masses=masses, skip_below=skip_below
        )
        assert int(out[0, 1].count_nonzero()) == int(pairs) == position + 1
        return pytest.approx(out[0, 0].tolist()), int(skipped)

    for newest in (True, False):
        assert attend(3, 0.4, newest) == ([7 / 9, 2 / 9, 0, 0], 2)  # below 0.1
        assert attend(3, 0.2, newest) == ([70 / 96, 20 / 96, 6 / 96, 0], 1)  # below 0.05
        masses = torch.tensor([1, 1, 1, 4])  # 0.625, 0.179, 0.054, 0.143; still four entries
        assert attend(3, 0.3, newest, masses) == ([70 / 106, 20 / 106, 0, 16 / 106], 1)  # below 0.075
    assert attend(2, 0.2) == ([7 / 9, 2 / 9, 0, 0], 1)  # of three keys the last weighs 0.0625, less than 0.2 / 3
    assert attend(1, 0.5) == ([1, 0, 0, 0], 1)  # of two the last weighs 0.222


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_components_of_queries_by_hand(backend: Literal["sdpa", "eager"]) -> None:
    """Magnitudes 1, 3, 5 and 1 have a root mean square of 3, 0.1 in each component one of 0.1."""
    queries = torch.tensor([[[1.0, -3.0, 5.0, -1.0], [0.1] * 4], [[5.0, 1.0, 3.0, 1.0], [0.0] * 4]])
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(4, 1, 4, generator=generator) for _ in range(2))
    everyone = torch.arange(4)

    def attend(asking: Tensor, positions: Tensor, query_below: float, newest: bool = False):
        return ragged_attention(
            asking, keys, values, positions, everyone, 1.0, newest, backend, query_below=query_below
        )

    kept = {0.3: [[1, 1, 1, 1]] * 2, 0.5: [[0, 1, 1, 0], [1, 0, 1, 0]], 1.1: [[0, 0, 1, 0], [1, 0, 0, 0]]}
    for query_below, rows in kept.items():
        masked = queries.clone()
        masked[:, 0] *= torch.tensor(rows)
        left_out = [4 - sum(row) for row in rows]
        if query_below > 1.0:  # all components of the second head's first query; a query of zeros keeps its own
            masked[0, 1] = 0.0
            left_out[0] += 4
        for positions, newest in (
            (torch.tensor([2, 3]), True),
            (torch.tensor([2, 3]), False),
            (torch.tensor([0, 2]), False),
        ):
            got = attend(queries, positions, query_below, newest)
            assert torch.equal(got.output, attend(masked, positions, 0.0, newest).output)
            assert got.values_skipped == 0
            seen = (positions + 1).tolist()
            assert int(got.scores_skipped) == sum(n * keys_seen for n, keys_seen in zip(left_out, seen, strict=True))
        for newest in (True, False):
            one = attend(queries[1:], torch.tensor([3]), query_below, newest)
            assert torch.equal(one.output, attend(masked[1:], torch.tensor([3]), 0.0, newest).output)
            assert int(one.scores_skipped) == left_out[1] * 4


@pytest.mark.slow
@settings(max_examples=40)
@given(plan=skipping_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_prefill_equals_decode_equals_chunks(plan: Plan, family: str, length: int, data: st.DataObject) -> None:
    """The same values are skipped too; plans that fuse are compared with the others of their kind."""
    engine = decoder(tiny.model(family, torch.float64), replace(plan, fusion=None), special_ids=[7])
    ids, cut = tiny.token_ids(length, seed=length), data.draw(st.integers(1, length - 1))
    whole = run_whole(engine, ids)
    for parts in (run_steps(engine, ids), run_chunks(engine, ids, [cut, length - cut])):
        torch.testing.assert_close(whole.logits, parts.logits, atol=ATOL, rtol=0)
        assert executed_cost(engine.spec, whole.trace) == executed_cost(engine.spec, parts.trace)
        for one, other in zip(whole.trace.layers, parts.trace.layers, strict=True):
            assert one.values_skipped == other.values_skipped
            assert one.scores_skipped == other.scores_skipped


@settings(max_examples=20)
@given(plan=skipping_plans, family=st.sampled_from(tiny.FAMILIES), lengths=st.lists(st.integers(1, 20), min_size=2))
def test_a_batch_equals_its_sequences_alone(plan: Plan, family: str, lengths: list[int]) -> None:
    engine = decoder(tiny.model(family, torch.float64), plan)
    sequences = [tiny.token_ids(n, seed=n) for n in lengths[:4]]
    batch, alone = run_batch(engine, sequences), [run_whole(engine, ids) for ids in sequences]
    torch.testing.assert_close(batch.logits, torch.cat([run.logits for run in alone]), atol=ATOL, rtol=0)
    for layer_idx, layer in enumerate(batch.trace.layers):
        each = [run.trace.layers[layer_idx] for run in alone]
        assert layer.values_skipped == sum(one.values_skipped for one in each)
        assert layer.scores_skipped == sum(one.scores_skipped for one in each)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
def test_prefill_equals_decode_in_bfloat16(family: str, fill: rules.FillRule) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]()).bfloat16()
    plan = skipping_plan(0.5, halting_plan(rules.RandomRule(0.35, seed=2), fill))
    engine, ids = decoder(model, plan), tiny.token_ids(24)
    whole, steps = (run.logits.float() for run in (run_whole(engine, ids), run_steps(engine, ids, prompt=9)))
    assert (whole - steps).abs().max() / whole.abs().max() < tolerances.LOGITS[torch.bfloat16]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flops_fall_by_the_head_width_for_each_value_skipped(family: str) -> None:
    """PyTorch's counter sees the plain products: all values of the pairs, read or masked out."""
    engine, ids = (
        decoder(tiny.model(family), skipping_plan((0.5, 0.0, 0.8, 1.0)), attention="eager"),
        tiny.token_ids(20),
    )
    trace = run_steps(engine, ids).trace
    cost, dense = executed_cost(engine.spec, trace), dense_cost(engine.spec, trace)
    skipped = [layer.values_skipped for layer in trace.layers]
    macs = sum(skipped) * engine.spec.head_dim
    with FlopCounterMode(display=False) as counter:
        run_steps(engine, ids)
    assert cost.flops + 2 * macs == dense.flops == counter.get_total_flops()
    assert cost.bitops + macs * 32 * 32 == dense.bitops
    assert cost.weight_bytes == dense.weight_bytes
    values = 4 * sum(dense_pairs(engine, 20))  # heads, pairs
    assert trace.values_read(4) == pytest.approx(1 - sum(skipped) / values)
    assert skipped[1] == 0 < trace.values_read(4) < 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flops_fall_by_one_product_for_each_component_and_key_left_out(family: str) -> None:
    """PyTorch's counter sees all products, but not the squares of queries in three of the four layers."""
    plan, ids = skipping_plan((0.0, 0.0, 0.5, 0.0), query_threshold=(0.4, 0.0, 0.8, 9.0)), tiny.token_ids(20)
    engine = decoder(tiny.model(family), plan, attention="eager")
    trace = run_steps(engine, ids).trace
    cost, dense = executed_cost(engine.spec, trace), dense_cost(engine.spec, trace)
    skipped = [layer.scores_skipped for layer in trace.layers]
    scores = [engine.spec.head_dim * 4 * pairs for pairs in dense_pairs(engine, 20)]  # of layers: components, heads
    shares = [count / of_layer for count, of_layer in zip(skipped, scores, strict=True)]
    assert shares[1] == 0 < shares[0] < shares[2] < shares[3] == 1
    macs = sum(skipped) + trace.layers[2].values_skipped * engine.spec.head_dim
    macs -= 3 * 20 * 4 * engine.spec.head_dim
    with FlopCounterMode(display=False) as counter:
        run_steps(engine, ids)
    assert cost.flops + 2 * macs == dense.flops == counter.get_total_flops()
    assert cost.bitops + macs * 32 * 32 == dense.bitops
    assert cost.weight_bytes == dense.weight_bytes
    assert trace.query_components_read(4, engine.spec.head_dim) == pytest.approx(1 - sum(skipped) / sum(scores))


def test_thresholds_for_another_depth_are_refused() -> None:
    with pytest.raises(PlanError, match="3 thresholds, the model has 4 layers"):
        decoder(tiny.model("gpt2"), skipping_plan((0.1, 0.2, 0.3)))
    with pytest.raises(PlanError, match="5 thresholds, the model has 4 layers"):
        decoder(tiny.model("gpt2"), skipping_plan(0.1, query_threshold=(0.1,) * 5))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"skip_below": 0.4}, {"screen": Screen(0.4, 0.5)}], ids=str)
@pytest.mark.parametrize("window", [1, 7, 140, 299, 300, 1000])
def test_a_window_is_that_much_of_the_entries(window: int, options: dict[str, Any], backend: Any) -> None:
    """Query by query with the entries that it sees; what is older is never looked at, whatever it holds."""
    generator = torch.Generator().manual_seed(window)
    positions = torch.arange(400)[torch.rand(400, generator=generator) < 0.75]  # some have left nothing
    keys, values = torch.randn(2, len(positions), 2, 8, generator=generator, dtype=torch.float64)
    queries = torch.randn(len(positions), 4, 8, generator=generator, dtype=torch.float64)
    masses = torch.randint(1, 4, (len(positions),), generator=generator)

    def attend(rows: slice, entries: slice, **given: Any) -> Attended:
        of_entries = keys[entries], values[entries], positions[rows], positions[entries], 0.3
        return ragged_attention(
            queries[rows], *of_entries, True, backend, masses=masses[entries], **{**options, **given}
        )

    for first in (0, len(positions) - 5, len(positions) - 1):
        rows = slice(first, None)
        found = attend(rows, slice(None), window=window)
        alone = []
        for t in range(first, len(positions)):
            oldest = int((positions > positions[t] - window).int().argmax())
            alone.append(attend(slice(t, t + 1), slice(oldest, t + 1)))
        wanted = torch.cat([each.output for each in alone])
        torch.testing.assert_close(found.output, wanted, atol=tolerances.LOGITS[torch.float64], rtol=0)
        for name in ("pairs", "values_skipped", "scores_skipped", "scored_twice"):
            assert int(getattr(found, name)) == sum(int(getattr(each, name)) for each in alone)
        assert found.entries == len(positions) - int((positions > positions[first] - window).int().argmax())
    old = positions <= positions[-1] - window
    keys[old], values[old] = float("nan"), float("nan")
    assert attend(slice(-1, None), slice(None), window=window).output.isfinite().all()
