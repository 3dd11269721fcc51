"""Layouts, states and counts: where rows come from survives selection."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from quicksilver.backends.state import SplitRows, State
from quicksilver.core.ragged import RaggedLayout
from quicksilver.core.trace import COUNT, Trace

sequences = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), min_size=1, max_size=5).filter(
    lambda pairs: sum(length for _, length in pairs) > 0
)


@given(sequences)
def test_build_lays_sequences_end_to_end(pairs: list[tuple[int, int]]) -> None:
    starts, lengths = zip(*pairs, strict=True)
    layout = RaggedLayout.build(starts, lengths, "cpu")
    expected = [(seq, starts[seq] + i) for seq, length in enumerate(lengths) for i in range(length)]
    assert list(zip(layout.seq_ids.tolist(), layout.positions.tolist(), strict=True)) == expected
    assert layout.origin.tolist() == list(range(len(expected)))
    assert layout.num_tokens == len(expected)


@given(sequences, st.data())
def test_select_keeps_rows_and_recounts(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    starts, lengths = zip(*pairs, strict=True)
    layout = RaggedLayout.build(starts, lengths, "cpu")
    keep = data.draw(st.lists(st.integers(0, layout.num_tokens - 1), unique=True).map(sorted))
    chosen = layout.select(torch.tensor(keep, dtype=torch.long))
    assert chosen.origin.tolist() == keep
    assert chosen.positions.tolist() == [layout.positions[i].item() for i in keep]
    assert list(chosen.lengths) == [chosen.seq_ids.tolist().count(seq) for seq in range(len(lengths))]


def test_states_of_tokens_that_stopped_return_to_their_origin() -> None:
    layout = RaggedLayout.build([0], [4], "cpu")
    state = State(layout, torch.arange(4.0)[:, None], layout, None, layout)
    state.halt(0, SplitRows(torch.tensor([0, 2]), torch.tensor([1, 3])))
    state.hidden = -state.hidden
    assert state.final()[:, 0].tolist() == [0.0, -1.0, 2.0, -3.0]
    assert state.halted is not None
    assert state.halted.tolist() == [0, 2]


def test_counts_mix_host_and_device_numbers() -> None:
    trace, place = Trace(num_layers=2), COUNT["attended"]
    for value in (1, torch.tensor(2), 3, torch.tensor(4)):
        trace.add(1, place, value)
    assert [layer.attended for layer in trace.layers] == [0, 10]
    trace.add(1, place, torch.tensor(5))
    assert trace.total("attended") == 15


def test_a_bounded_number_of_device_numbers_is_kept() -> None:
    trace = Trace(num_layers=1)
    for _ in range(2000):
        trace.add(0, 0, torch.tensor(1))
    assert len(trace._on_device) < 1000
    assert trace.layers[0].query_rows == 2000


def test_dense_pairs_are_causal() -> None:
    trace = Trace(num_layers=2)
    trace.begin_pass([0, 10], RaggedLayout.build([0, 10], [3, 2], "cpu"))
    assert trace.dense_pairs() == (1 + 2 + 3) + (11 + 12)
    assert trace.dense_pairs(12) == trace.dense_pairs()
    assert trace.dense_pairs(11) == (1 + 2 + 3) + (11 + 11)
    assert trace.dense_pairs(2) == (1 + 2 + 2) + (2 + 2)
