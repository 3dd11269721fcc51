"""The cache over layers and sequences: who wrote an entry where, at which position, in how many bytes.

Which tokens write, and what, is decided elsewhere; attention is computed elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quicksilver.cache.stores import EntryStore, OwnedEntries, SharedEntries
from quicksilver.core.ragged import RaggedLayout


@dataclass(frozen=True)
class CacheShape:
    """What the cache must know of a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class Entries(NamedTuple):
    """One sequence's entries in one layer: keys and values [n, num_kv_heads, head_dim], positions [n]."""

    keys: Tensor
    values: Tensor
    positions: Tensor


class RaggedKVCache:
    """Keys and values of a batch of sequences, each layer and sequence with a length of its own.

    Args:
        shape: the model's layers, heads and dtype.
        batch_size: number of sequences.
        shared: store each sequence's entries once and let layers refer to them (the `share` fill).
        owner: what may continue this cache; a run refuses a cache whose owner differs from its own.

    Attributes:
        seq_lengths: logical length of each sequence.
        columns: columns of the padded grids fed so far, kept by whoever feeds grids.
        in_pass: a pass has begun and not ended; if none is under way, it failed and the entries are not whole.
    """

    is_compileable = False

    def __init__(self, shape: CacheShape, batch_size: int, shared: bool = False, owner: object = None) -> None:
        store: type[EntryStore] = SharedEntries if shared else OwnedEntries
        self.shape = shape
        self.owner = owner
        self.seq_lengths = [0] * batch_size
        self.columns = 0
        self.in_pass = False
        self._stores = [store(shape.num_layers, self._row_shape, shape.dtype, shape.device) for _ in range(batch_size)]

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.seq_lengths)

    @property
    def _row_shape(self) -> tuple[int, int]:
        return (self.shape.num_kv_heads, self.shape.head_dim)

    def advance(self, layout: RaggedLayout) -> None:
        """Count the tokens of a finished pass as seen; after a prefill, give back the room that it left."""
        for seq, length in enumerate(layout.lengths):
            self.seq_lengths[seq] += length
            if length > 1:
                self._stores[seq].trim()
        self.in_pass = False

    def append(
        self,
        layer_idx: int,
        layout: RaggedLayout,
        keys: Tensor,
        values: Tensor,
        refer: RaggedLayout | None = None,
    ) -> None:
        """Write new entries of one layer.

        Args:
            layer_idx: the layer.
            layout: of the tokens whose keys and values are given.
            keys: [N, num_kv_heads, head_dim], rotated where the model rotates.
            values: [N, num_kv_heads, head_dim].
            refer: all tokens the layer should list, given ones included; those not given are referred to
                at their newest entry (shared caches only).
        """
        bounds, refer_bounds = layout.bounds, None if refer is None else refer.bounds
        for seq, store in enumerate(self._stores):
            rows = slice(bounds[seq], bounds[seq + 1])
            listed = layout.positions[rows]
            if refer is not None and refer_bounds is not None:
                listed = refer.positions[refer_bounds[seq] : refer_bounds[seq + 1]]
            if listed.shape[0]:
                store.append(layer_idx, layout.positions[rows], keys[rows], values[rows], listed)

    def entries(self, layer_idx: int, seq: int) -> Entries:
        """Return one sequence's entries in one layer, oldest first."""
        return Entries(*self._stores[seq].entries(layer_idx))

    def entry_counts(self, layer_idx: int) -> list[int]:
        """Entries that each sequence lists in a layer."""
        return [store.length(layer_idx) for store in self._stores]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values, positions and indices, room to grow included."""
        return sum(store.nbytes for store in self._stores)

    @property
    def used_nbytes(self) -> int:
        """Bytes of what is held, without room to grow."""
        return sum(store.used_nbytes for store in self._stores)

    @property
    def num_entries(self) -> int:
        """Entries listed, over all layers and sequences."""
        return sum(sum(self.entry_counts(i)) for i in range(self.shape.num_layers))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen, padding included, by which transformers slices what it feeds next."""
        return max(self.columns, *self.seq_lengths)
