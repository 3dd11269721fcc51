"""No look-ahead: what comes after position t never changes the logits, or the depths, up to t."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quicksilver.plan import Plan
from quicksilver.runtime.loop import Decoder
from tests import tiny, tolerances
from tests.engines import Run, decoder, run_batch, run_steps, run_whole
from tests.strategies import coded_plans, fusing_plans, plans, precise_plans, skipping_plans

pytestmark = pytest.mark.slow  # whole spaces of plans are drawn from

ROTARY = ("llama-rope-dynamic", "llama-rope-longrope", "llama-rope-llama3")


def assert_same_until(one: Run, other: Run, end: int) -> None:
    atol = tolerances.LOGITS[one.logits.dtype]
    torch.testing.assert_close(one.logits[:end], other.logits[:end], atol=atol, rtol=0)
    assert torch.equal(torch.cat(one.trace.depths)[:end], torch.cat(other.trace.depths)[:end])


def assert_blind(engine: Decoder, ids: Tensor, changed: Tensor, keep: int) -> None:
    """Other tokens after the first `keep`, or none, change nothing up to there, in one pass or token by token."""
    whole = run_whole(engine, ids)
    assert_same_until(whole, run_whole(engine, changed), keep)
    assert_same_until(whole, run_whole(engine, ids[:keep]), keep)
    assert_same_until(run_steps(engine, ids), run_steps(engine, changed), keep)


@settings(max_examples=30)
@given(
    plan=plans,
    name=st.sampled_from(
        [
            *tiny.FAMILIES,
            "mistral-window",
            "smollm3-windows",
            "llama-rope-dynamic",
            "llama-rope-longrope",
            "llama-rope-llama3",
        ]
    ),
    length=st.integers(2, 30),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_later_tokens_change_nothing(plan: Plan, name: str, length: int, seed: int, data: st.DataObject) -> None:
    engine = decoder(tiny.model(name), plan, special_ids=[7])
    ids = tiny.token_ids(length, seed)
    keep = data.draw(st.integers(1, length - 1))
    changed = torch.cat((ids[:keep], tiny.token_ids(length - keep + data.draw(st.integers(0, 9)), seed + 1000)))
    assert_blind(engine, ids, changed, keep)


@settings(max_examples=20)
@given(plan=plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(1, 20), other=st.integers(1, 30))
def test_neighbours_in_a_batch_change_nothing(plan: Plan, family: str, length: int, other: int) -> None:
    engine = decoder(tiny.model(family), plan)
    ids, neighbour = tiny.token_ids(length), tiny.token_ids(other, seed=1)
    assert_same_until(run_whole(engine, ids), run_batch(engine, [ids, neighbour]), length)


@settings(max_examples=30)
@given(plan=fusing_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_later_tokens_change_nothing_where_tokens_fuse(
    plan: Plan, family: str, length: int, data: st.DataObject
) -> None:
    """Token by token, a token has predicted before a later one can absorb it: no exception is made."""
    engine = decoder(tiny.model(family), plan, special_ids=[7])
    ids, keep = tiny.token_ids(length, seed=length), data.draw(st.integers(1, length - 1))
    changed = torch.cat((ids[:keep], tiny.token_ids(length - keep, seed=1000)))
    prompt = data.draw(st.integers(1, keep))
    atol = tolerances.LOGITS[torch.float32]
    one, other = (run_steps(engine, tokens, prompt).logits[prompt - 1 : keep] for tokens in (ids, changed))
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


@settings(max_examples=30)
@given(plan=fusing_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_in_one_pass_later_tokens_decide_only_who_is_absorbed_at_the_end(
    plan: Plan, family: str, length: int, data: st.DataObject
) -> None:
    """In one pass a token that a later one absorbs is read at the fusion layer; its state there knows nothing of it.

    Tokens before the group that a cut goes through stand as if nothing followed them: the cache says where it begins.
    At several layers a group that grows may leave those before it to themselves, so a few more depths can change.
    """
    engine = decoder(tiny.model(family), plan, special_ids=[7])
    ids, keep = tiny.token_ids(length, seed=length), data.draw(st.integers(1, length - 1))
    whole, prefix = run_whole(engine, ids), run_whole(engine, ids[:keep])
    if settled := whole.cache.sequences[0].kept(keep):
        assert_same_until(whole, run_whole(engine, ids[:settled]), settled)
    same = whole.trace.depths[0][:keep] == prefix.trace.depths[0]
    num_layers = 0 if plan.fusion is None else len(plan.fusion.layers)
    assert int((~same).sum()) <= num_layers * (num_layers + 1) // 2
    if num_layers <= 1:
        atol = tolerances.LOGITS[torch.float32]
        torch.testing.assert_close(whole.logits[:keep][same], prefix.logits[same], atol=atol, rtol=0)


@settings(max_examples=40)
@given(plan=precise_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_later_tokens_change_nothing_where_widths_are_chosen(
    plan: Plan, family: str, length: int, data: st.DataObject
) -> None:
    engine = decoder(tiny.quantized(family, torch.float64), plan, special_ids=[7])
    ids, keep = tiny.token_ids(length, seed=length), data.draw(st.integers(1, length - 1))
    assert_blind(engine, ids, torch.cat((ids[:keep], tiny.token_ids(length - keep, seed=1000))), keep)


@settings(max_examples=40)
@given(
    plan=skipping_plans | coded_plans,
    family=st.sampled_from(tiny.FAMILIES),
    length=st.integers(2, 24),
    data=st.data(),
)
def test_later_tokens_change_nothing_where_attention_skips_or_reads_codes(
    plan: Plan, family: str, length: int, data: st.DataObject
) -> None:
    engine = decoder(tiny.model(family, torch.float64), replace(plan, fusion=None), special_ids=[7])
    ids, keep = tiny.token_ids(length, seed=length), data.draw(st.integers(1, length - 1))
    assert_blind(engine, ids, torch.cat((ids[:keep], tiny.token_ids(length - keep, seed=1000))), keep)
