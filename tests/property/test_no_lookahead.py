"""No look-ahead: what comes after position t never changes the logits, or the depths, up to t."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quicksilver.core.plan import Plan
from tests import tiny, tolerances
from tests.engines import Run, decoder, run_batch, run_steps, run_whole
from tests.strategies import plans


def assert_same_until(one: Run, other: Run, end: int) -> None:
    atol = tolerances.LOGITS[torch.float32]
    torch.testing.assert_close(one.logits[:end], other.logits[:end], atol=atol, rtol=0)
    assert torch.equal(torch.cat(one.trace.depths)[:end], torch.cat(other.trace.depths)[:end])


@settings(max_examples=60, deadline=None)
@given(
    plan=plans,
    name=st.sampled_from([*tiny.FAMILIES, "llama-rope-dynamic", "llama-rope-longrope", "llama-rope-llama3"]),
    length=st.integers(2, 30),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_later_tokens_change_nothing(plan: Plan, name: str, length: int, seed: int, data: st.DataObject) -> None:
    engine = decoder(tiny.model(name), plan, special_ids=[7])
    ids = tiny.token_ids(length, seed)
    keep = data.draw(st.integers(1, length - 1))
    changed = torch.cat((ids[:keep], tiny.token_ids(length - keep + data.draw(st.integers(0, 9)), seed + 1000)))
    whole = run_whole(engine, ids)
    assert_same_until(whole, run_whole(engine, changed), keep)
    assert_same_until(whole, run_whole(engine, ids[:keep]), keep)
    assert_same_until(run_steps(engine, ids), run_steps(engine, changed), keep)


@settings(max_examples=20, deadline=None)
@given(plan=plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(1, 20), other=st.integers(1, 30))
def test_neighbours_in_a_batch_change_nothing(plan: Plan, family: str, length: int, other: int) -> None:
    engine = decoder(tiny.model(family), plan)
    ids, neighbour = tiny.token_ids(length), tiny.token_ids(other, seed=1)
    assert_same_until(run_whole(engine, ids), run_batch(engine, [ids, neighbour]), length)
