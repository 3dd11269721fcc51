"""The ragged cache: growth without copying per token, ragged lengths."""

from __future__ import annotations

import torch

from quicksilver.cache import CacheShape, RaggedKVCache
from quicksilver.cache.buffers import RowBuffer
from quicksilver.core.ragged import RaggedLayout

CPU = torch.device("cpu")
SHAPE = CacheShape(num_layers=2, num_kv_heads=2, head_dim=3, dtype=torch.float32, device=CPU)


def rows(layout: RaggedLayout, offset: float = 0.0) -> torch.Tensor:
    """Keys that say which sequence and position they belong to."""
    marks = layout.seq_ids * 100.0 + layout.positions + offset
    return marks[:, None, None].expand(-1, 2, 3).contiguous()


def test_a_first_append_allocates_exactly() -> None:
    buffer = RowBuffer((4,), torch.float32, CPU)
    buffer.append(torch.ones(7, 4))
    assert buffer.nbytes == 7 * 4 * 4


def test_growth_copies_rarely_and_keeps_everything() -> None:
    buffer = RowBuffer((1,), torch.float32, CPU)
    allocations = set()
    for i in range(5000):
        buffer.append(torch.full((1, 1), float(i)))
        allocations.add(buffer.nbytes)
    assert torch.equal(buffer.rows[:, 0], torch.arange(5000.0))
    assert len(allocations) < 40
    assert buffer.nbytes <= 1.26 * 5000 * 4 + 33 * 4


def test_sequences_and_layers_have_lengths_of_their_own() -> None:
    cache = RaggedKVCache(SHAPE, batch_size=3)
    layout = RaggedLayout.build([0, 0, 0], [2, 0, 3], CPU)
    cache.append(0, layout, rows(layout), rows(layout))
    some = layout.select(torch.tensor([1, 2, 4]))
    cache.append(1, some, rows(some), rows(some))
    cache.advance(layout)
    assert cache.entry_counts(0) == [2, 0, 3]
    assert cache.entry_counts(1) == [1, 0, 2]
    assert cache.entries(1, 2).positions.tolist() == [0, 2]
    assert cache.entries(1, 2).keys[:, 0, 0].tolist() == [200.0, 202.0]
    assert cache.seq_lengths == [2, 0, 3]
    assert cache.get_seq_length() == 3
    assert cache.num_entries == 8


def test_bytes_are_those_of_the_tensors() -> None:
    cache = RaggedKVCache(SHAPE, batch_size=1)
    layout = RaggedLayout.build([0], [5], CPU)
    cache.append(0, layout, rows(layout), rows(layout))
    entry = 2 * 3 * 4
    assert cache.nbytes == 5 * (2 * entry + 4)
