"""Steps over any sequences: they join and leave, are cut back and copied, fail and go on, under one plan or another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quicksilver import rules
from quicksilver.cache import RaggedKVCache, SequenceCache
from quicksilver.errors import InputError
from quicksilver.families.registry import adapt
from quicksilver.plan import Plan
from quicksilver.runtime.loop import Decoder
from tests import oracle, tiny, tolerances
from tests.engines import decoder, fusion_plan, halting_plan
from tests.strategies import coded_plans, fusing_plans, plans, skipping_plans

ATOL = tolerances.LOGITS[torch.float32]
DEPTHS = (4, 2, 3, 1)
PLANS = {
    "dense": Plan.dense(),
    "halting": halting_plan(rules.ForcedRule(DEPTHS), rules.PropagateFill()),
    "dropping": halting_plan(rules.ForcedRule(DEPTHS)),
    "fusion": fusion_plan(rules.RandomFusionRule(0.6, seed=1), weights="mass"),
    "fusion and halting": fusion_plan(
        rules.RandomFusionRule(0.7, seed=4), rules.ForcedRule(DEPTHS), rules.PropagateFill(), layers=(2,)
    ),
    "8-bit entries": Plan("coded", kv=rules.KVConfig(bits=8)),
}
SEVERAL = fusion_plan(rules.RandomFusionRule(0.6, seed=2), layers=(1, 2, 3), max_group=5)


def engines(plan: Plan) -> dict[str, Decoder]:
    quantized = tiny.quantized("llama")
    return {
        "plain": decoder(tiny.model("llama"), plan),
        "quantized": decoder(quantized, plan),
        "native": decoder(quantized, plan, "native"),
    }


def step(engine: Decoder, *fed: tuple[SequenceCache, Tensor], prompt: Any = False) -> list[Tensor]:
    """Feed each cache its tokens; return the logits of each, computed row by row."""
    lengths, trace = [len(ids) for _, ids in fed], engine.new_trace(per_token=True)
    hidden = engine.run(torch.cat([ids for _, ids in fed]), lengths, [cache for cache, _ in fed], trace, prompt)
    return list(torch.cat([engine.logits(row[None], trace) for row in hidden]).split(lengths))


def assert_same(one: SequenceCache, other: SequenceCache, atol: float = 0.0) -> None:
    """Compare two caches' lengths and entries."""
    assert one.length == other.length
    for layer_idx in range(one.shape.num_layers):
        first, second = one.entries(layer_idx), other.entries(layer_idx)
        assert torch.equal(first.positions, second.positions)
        masses = [torch.ones_like(e.positions) if e.masses is None else e.masses for e in (first, second)]
        assert torch.equal(*masses)
        torch.testing.assert_close(first.keys, second.keys, atol=atol, rtol=0)
        torch.testing.assert_close(first.values, second.values, atol=atol, rtol=0)


@pytest.mark.parametrize("kernels", ["plain", "quantized", "native"])
@pytest.mark.parametrize("name", PLANS)
def test_sequences_join_and_leave_between_steps(name: str, kernels: str) -> None:
    """To the bit where the native kernels run all; PyTorch's products are others for another number of rows."""
    engine = engines(PLANS[name])[kernels]
    a, b, c = (tiny.token_ids(n, seed=n) for n in (9, 12, 11))
    one, two, three = (engine.new_sequence() for _ in range(3))
    got: dict[str, list[Tensor]] = {"a": [], "b": [], "c": []}
    for who in ("a0:4 b0:6", "b6:7 c0:8", "a4:5", "c8:9 a5:6 b7:7", "b7:12", "a6:9 c9:11"):
        parts = [(part[0], *map(int, part[1:].split(":"))) for part in who.split()]
        caches, ids = {"a": one, "b": two, "c": three}, {"a": a, "b": b, "c": c}
        logits = step(engine, *((caches[key], ids[key][start:end]) for key, start, end in parts))
        for (key, *_), rows in zip(parts, logits, strict=True):
            got[key].append(rows)
    cuts = {"a": (a, one, [4, 1, 1, 3]), "b": (b, two, [6, 1, 5]), "c": (c, three, [8, 1, 2])}
    atol = 0.0 if kernels == "native" and name in ("dense", "dropping", "8-bit entries") else ATOL
    for key, (ids, cache, sizes) in cuts.items():
        alone = engine.new_sequence()
        expected = torch.cat([step(engine, (alone, part))[0] for part in ids.split(sizes)])
        torch.testing.assert_close(torch.cat(got[key]), expected, atol=atol, rtol=0)
        assert_same(cache, alone, atol)


@pytest.mark.parametrize(
    "fill", [rules.DropFill(), rules.ZeroFill(), rules.PropagateFill()], ids=lambda f: type(f).__name__
)
def test_a_prompt_under_one_plan_is_continued_under_another(fill: rules.FillRule) -> None:
    """Dense or fused tokens first, then tokens that halt: the oracle in which position decides."""
    ids, change, model = tiny.token_ids(16), 9, tiny.model("llama")
    joins = (False, True, True, False, True)
    fusing = fusion_plan(rules.ForcedFusionRule(joins), scope="prompt", layers=(2,))
    adapter = adapt(model, "torch")
    halting = Decoder(adapter, halting_plan(rules.ForcedRule(DEPTHS), fill))
    late = torch.arange(16) >= change
    depths = torch.tensor(DEPTHS * 4)
    grouped = oracle.Fusion((1,), 3, "last", lambda _, hidden, earlier, later: later < change and joins[later % 5])
    for plan, fusion in ((Plan.dense(), None), (fusing, grouped)):
        first, cache = Decoder(adapter, plan), halting.new_sequence()
        step(first, (cache, ids[:change]), prompt=True)
        got = [*step(halting, (cache, ids[change:13])), *(step(halting, (cache, t))[0] for t in ids[13:].split(1))]
        expected = oracle.run(model, ids, fill, lambda layer_idx, *_: late & (depths <= layer_idx + 1), fusion)
        torch.testing.assert_close(torch.cat(got), expected.logits[change:], atol=ATOL, rtol=0)
        assert cache.open_group is None
    assert [layer.tolist() for layer in expected.masses[:, :change].sum(1)] == [9, 9, 9, 9]


def test_an_open_group_waits_for_plans_that_fuse_at_its_layer_alone() -> None:
    adapter, ids = adapt(tiny.model("llama"), "torch"), tiny.token_ids(8)
    all_alike = rules.RandomFusionRule(1.0)
    first = Decoder(adapter, fusion_plan(all_alike, max_group=9))
    for plan, groups in (
        (fusion_plan(all_alike, max_group=9), [8]),
        (fusion_plan(all_alike, max_group=6), [6, 2]),
        (fusion_plan(all_alike, max_group=9, weights="mass"), [5, 3]),
        (fusion_plan(all_alike, max_group=9, layers=(2,)), [5, 3]),
        (fusion_plan(all_alike, max_group=9, layers=(1, 2)), [5, 3]),
        (Plan.dense(), [5, 1, 1, 1]),
    ):
        cache = first.new_sequence()
        step(first, (cache, ids[:5]))
        step(Decoder(adapter, plan), (cache, ids[5:]), prompt=True)
        masses = cache.entries(3).masses
        assert masses is not None
        assert masses.tolist() == groups


MECHANISMS = st.one_of(plans, fusing_plans, skipping_plans, coded_plans)


@settings(max_examples=100, deadline=None)
@given(plan=MECHANISMS, length=st.integers(2, 20), data=st.data())
def test_a_cut_is_as_if_nothing_behind_it_had_been_fed(plan: Plan, length: int, data: st.DataObject) -> None:
    engine = decoder(tiny.model("llama", torch.float64), plan, special_ids=[7])
    ids, prompt = tiny.token_ids(length, seed=length), data.draw(st.booleans())
    cut = data.draw(st.integers(0, length))
    sizes = st.lists(st.integers(1, length), min_size=1, max_size=4)
    crosses = plan.fusion is None or len(plan.fusion.layers) == 1  # else what fuses depends on the passes
    cache = engine.new_sequence()
    for start, end in passes(data.draw(sizes) if crosses else [length], 0, length):
        step(engine, (cache, ids[start:end]), prompt=prompt)
    kept = cache.truncate(cut)
    assert kept == cut or (plan.fusion is not None and kept < cut)
    fresh = engine.new_sequence()
    if kept:
        step(engine, (fresh, ids[:kept]), prompt=prompt)
    other = torch.cat((ids[:cut], tiny.token_ids(length - cut, seed=99)))  # but for `cut` tokens, others may follow
    for start, end in passes([cut - kept, *data.draw(sizes)] if cut > kept else data.draw(sizes), kept, length):
        got, expected = (step(engine, (each, other[start:end]), prompt=prompt)[0] for each in (cache, fresh))
        torch.testing.assert_close(got, expected, atol=tolerances.LOGITS[torch.float64], rtol=0)
    assert_same(cache, fresh, ATOL)
    if crosses:
        whole = engine.new_sequence()
        step(engine, (whole, other), prompt=prompt)
        assert_same(cache, whole, ATOL)


def passes(sizes: Sequence[int], start: int, end: int) -> list[tuple[int, int]]:
    """Return where passes of these sizes begin and end, and one more for what they leave."""
    cuts = [start]
    for size in sizes:
        cuts.append(min(cuts[-1] + size, end))
    return [(a, b) for a, b in zip(cuts, [*cuts[1:], end], strict=True) if a < b]


@pytest.mark.parametrize("name", PLANS)
def test_a_copy_goes_its_own_way(name: str) -> None:
    engine, ids = decoder(tiny.model("gpt2"), PLANS[name]), tiny.token_ids(14)
    turns = tiny.token_ids(5, seed=3), tiny.token_ids(5, seed=4)
    first = engine.new_sequence()
    step(engine, (first, ids))
    caches = first, first.copy()
    got = step(engine, *zip(caches, turns, strict=True))
    for cache, turn, logits in zip(caches, turns, got, strict=True):
        alone = engine.new_sequence()
        step(engine, (alone, ids))
        torch.testing.assert_close(logits, step(engine, (alone, turn))[0], atol=ATOL, rtol=0)
        assert_same(cache, alone, ATOL)


def test_rows_of_a_batch_take_their_open_groups_along() -> None:
    engine = decoder(tiny.model("llama"), fusion_plan(rules.RandomFusionRule(0.7, seed=1), max_group=5))
    sequences = [tiny.token_ids(n, seed=n) for n in (9, 5, 7)]
    cache = engine.new_cache(3)
    step(engine, *((each, ids) for each, ids in zip(cache.sequences, sequences, strict=True)))
    cache.batch_select_indices([2, 2, 0])
    turns = tiny.token_ids(12, seed=2).split(4)
    step(engine, *zip(cache.sequences, turns, strict=True))
    for seq, row in enumerate((2, 2, 0)):
        alone = engine.new_sequence()
        step(engine, (alone, torch.cat((sequences[row], turns[seq]))))
        assert_same(cache.sequences[seq], alone, ATOL)


def test_what_is_wrong_with_one_sequence_is_said_and_leaves_all_as_they_were() -> None:
    engine, ids = decoder(tiny.model("llama"), PLANS["fusion"]), tiny.token_ids(6)
    caches = [engine.new_sequence() for _ in range(3)]
    step(engine, *((cache, ids) for cache in caches))
    dropped, full = engine.new_sequence(), engine.new_sequence()
    dropped.drop()
    step(engine, (full, tiny.token_ids(engine.spec.max_positions)))
    other = decoder(tiny.model("llama"), PLANS["fusion"]).new_sequence()
    coded = SequenceCache(engine.spec.cache_shape(8), engine.adapter.identity)
    wrong, token = torch.tensor([tiny.VOCAB]), torch.tensor([5])
    a, b, c = caches
    for fed, problem in (
        ([(a, token), (b, wrong), (c, token)], f"sequence 1: token id {tiny.VOCAB} is outside the vocabulary"),
        ([(a, token), (c, token), (b, -token)], "sequence 2: token id -5 is outside the vocabulary"),
        ([(a, token), (full, token)], "sequence 1: a sequence of 65 tokens is longer than the model's context of 64"),
        ([(a, token), (dropped, token)], "sequence 1: the cache was dropped; start a new one"),
        ([(other, token), (b, token)], "sequence 0: the cache was written by another model; start a new one"),
        (
            [(a, token), (coded, token)],
            "sequence 1: the cache keeps entries of 8 bits, where the plan asks for entries",
        ),
        ([(a, token), (b, token), (a, token)], "sequence 2: its cache is another's too; give each a copy"),
    ):
        with pytest.raises(InputError, match=problem):
            step(engine, *fed)
    with pytest.raises(InputError, match=r"lengths \[2, 1\] do not divide 2 tokens"):
        engine.run(ids[:2], [2, 1], [a, b], engine.new_trace())
    with pytest.raises(InputError, match="2 sequences were given to a cache of 3"):
        engine.run(ids[:2], [1, 1], caches, engine.new_trace())
    with pytest.raises(InputError, match="no tokens were given"):
        engine.run(ids[:0], [0, 0], [a, b], engine.new_trace())
    for cache in caches:
        fresh = engine.new_sequence()
        step(engine, (fresh, ids))
        step(engine, (fresh, token))
        step(engine, (cache, token))
        assert_same(cache, fresh, ATOL)


def test_a_pass_that_fails_spoils_its_own_sequences_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ids = decoder(tiny.model("llama"), PLANS["halting"]), tiny.token_ids(6)
    fed, waiting, elsewhere = (engine.new_sequence() for _ in range(3))
    step(engine, *((cache, ids) for cache in (fed, waiting, elsewhere)))
    with monkeypatch.context() as patched:
        patched.setattr(SequenceCache, "append", fail)
        with pytest.raises(OSError, match="in the middle"):
            step(engine, (fed, ids[:1]), (waiting, ids[:0]))
    with pytest.raises(InputError, match="sequence 1: an earlier pass over this cache failed and left it incomplete"):
        step(engine, (waiting, ids[:1]), (fed, ids[:1]))
    step(engine, (waiting, ids[:1]), (elsewhere, ids[:1]))
    assert_same(waiting, elsewhere, ATOL)
    fed.reset()
    step(engine, (fed, torch.cat((ids, ids[:1]))))
    assert_same(fed, waiting, ATOL)


def fail(*_: object) -> None:
    raise OSError("in the middle")


def test_a_batch_and_its_sequences_are_one() -> None:
    engine, ids = decoder(tiny.model("gpt2"), Plan.dense()), tiny.token_ids(6)
    cache, trace = engine.new_cache(2), engine.new_trace()
    assert isinstance(cache, RaggedKVCache)
    engine.run(ids, [4, 2], cache, trace)
    engine.run(ids[:1], [1], cache.sequences[1:], trace)
    assert cache.seq_lengths == [4, 3]
    with pytest.raises(InputError, match="not filled by calls of the model alone"):
        cache.crop(-1)
