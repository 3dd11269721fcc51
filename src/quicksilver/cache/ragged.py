"""The cache over layers and sequences: who wrote an entry where, at which position, in how many bytes.

Which tokens write, and what, is decided elsewhere; attention is computed elsewhere.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quicksilver.cache.buffers import Account, RowBuffer
from quicksilver.cache.coded import SCALE_BYTES, CodedRowBuffer, RoundedRowBuffer
from quicksilver.cache.columns import FedColumns
from quicksilver.cache.stores import EntryRows, EntryStore
from quicksilver.cache.tails import FusionTails, TakenBack
from quicksilver.core.bits import ENTRY_BITS, HALF_BITS
from quicksilver.core.ragged import RaggedLayout
from quicksilver.errors import InputError

_BUFFERS = {None: RowBuffer, HALF_BITS: RoundedRowBuffer, ENTRY_BITS: CodedRowBuffer}  # by the bits of a number


@dataclass(frozen=True)
class CacheShape:
    """What the cache must know of a model and its plan.

    Attributes:
        num_layers: layers.
        num_kv_heads: heads of keys and values.
        head_dim: width of each.
        dtype: of keys and values as they are written and read.
        device: where they live.
        entry_bits: they are kept in so many: 8 for int8 codes with a scale for each entry and head, 16 for bfloat16;
            None for their own dtype.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    entry_bits: int | None = None

    @property
    def coded(self) -> bool:
        """Whether entries are codes with scales."""
        return self.entry_bits == ENTRY_BITS

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry's key and value."""
        bits = 8 * self.dtype.itemsize if self.entry_bits is None else self.entry_bits
        return 2 * self.num_kv_heads * (self.head_dim * bits // 8 + (SCALE_BYTES if self.coded else 0))


class Entries(NamedTuple):
    """One sequence's entries in one layer.

    Attributes:
        keys: [n, num_kv_heads, head_dim].
        values: like keys.
        positions: [n] logical positions.
        masses: [n] tokens that each entry stands for, None where each stands for one.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    masses: Tensor | None


class RaggedKVCache:
    """Keys and values of a batch of sequences, each layer and sequence with a length of its own.

    Args:
        shape: the model's layers, heads and dtype.
        batch_size: number of sequences.
        owner: what may continue this cache; a run refuses a cache whose owner differs from its own.
        fusion_layers: indices of the layers after which tokens fuse, ascending.

    Attributes:
        seq_lengths: logical length of each sequence.
        fed: the columns of the padded grids fed so far, kept by whoever feeds grids.
        in_pass: a pass has begun and not ended; if none is under way, it failed and the entries are not whole.
        tails: where each sequence's last group stands at each fusion layer.
    """

    def __init__(
        self,
        shape: CacheShape,
        batch_size: int,
        owner: object = None,
        fusion_layers: tuple[int, ...] = (),
    ) -> None:
        self.shape = shape
        self.owner = owner
        self.seq_lengths = [0] * batch_size
        self.fed = FedColumns()
        self.in_pass = False
        self.tails = FusionTails(fusion_layers, batch_size)
        rows = _BUFFERS[shape.entry_bits]
        row_shape = (shape.num_kv_heads, shape.head_dim)

        def new_rows(account: Account) -> EntryRows:
            return rows(row_shape, shape.dtype, shape.device, account)

        self._stores: list[EntryStore] = [
            EntryStore(shape.num_layers, new_rows, shape.device) for _ in range(batch_size)
        ]

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.seq_lengths)

    def advance(self, layout: RaggedLayout, fuses: Sequence[bool] = ()) -> None:
        """Count the tokens of a finished pass as seen; after a prefill, give back the room that it left.

        Args:
            layout: of the pass.
            fuses: for each sequence, whether its tokens could fuse; the tails of those that could not are dropped.
        """
        for seq, length in enumerate(layout.lengths):
            self.seq_lengths[seq] += length
            if length and not (fuses and fuses[seq]):
                self.tails.forget(seq)
            if length > 1:
                self._stores[seq].trim()
        self.in_pass = False

    def append(
        self,
        layer_idx: int,
        layout: RaggedLayout,
        keys: Tensor,
        values: Tensor,
        masses: Tensor | None = None,
    ) -> None:
        """Write new entries of one layer.

        Args:
            layer_idx: the layer.
            layout: of the tokens that write.
            keys: [N, num_kv_heads, head_dim], rotated where the model rotates.
            values: [N, num_kv_heads, head_dim].
            masses: [N] tokens that each of them stands for, None for one each.
        """
        bounds = layout.bounds
        for seq, store in enumerate(self._stores):
            rows = slice(bounds[seq], bounds[seq + 1])
            if rows.start == rows.stop:
                continue
            store.append(
                layer_idx,
                layout.positions[rows],
                keys[rows],
                values[rows],
                None if masses is None else masses[rows],
            )

    def extend(self, layers: range, lengths: Sequence[int]) -> list[int]:
        """Add entries that a kernel is about to write: `lengths[b]` of each sequence in each layer.

        Returns:
            For each layer and sequence, one after another, what `EntryStore.extend` gives.
        """
        places: list[int] = []
        of_stores = [store.extend(layers, length) for store, length in zip(self._stores, lengths, strict=True)]
        for of_layer in zip(*of_stores, strict=True):
            for place in of_layer:
                places += place
        return places

    def take_back(self, after_layer: int, seq: int, position: int) -> list[TakenBack]:
        """Forget the sequence's entries and tails at `position` in the layers after `after_layer`.

        The token at `position` is the last of the sequence so far. Returns what changed in the tails.
        """
        store = self._stores[seq]
        deeper = [i for i in range(after_layer + 1, self.shape.num_layers) if store.length(i)]
        if deeper:
            last = torch.stack([store.positions(i)[-1] for i in deeper]).tolist()
            store.drop_last([i for i, found in zip(deeper, last, strict=True) if found == position])
        return self.tails.take_back(after_layer, seq, position)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Take back the last tokens of sequences, as if they had not been fed.

        Args:
            lengths: tokens that each sequence keeps.

        Raises:
            InputError: a length that is not from 0 to the sequence's, or a cut through a group of fused tokens, or
                behind tokens that what comes next may fuse with; then nothing is taken back.
        """
        if len(lengths) != self.batch_size:
            raise InputError(f"{len(lengths)} lengths were given for a cache of {self.batch_size} sequences")
        cut = [(seq, n) for seq, (n, seen) in enumerate(zip(lengths, self.seq_lengths, strict=True)) if n != seen]
        for seq, length in cut:
            if not 0 <= length <= self.seq_lengths[seq]:
                raise InputError(f"sequence {seq} holds {self.seq_lengths[seq]} tokens; it cannot be cut to {length}")
            if length and (self.tails.has(seq) or self._stores[seq].splits_group(length)):
                raise InputError(
                    f"sequence {seq} cannot be cut to {length} tokens: the plan has fused tokens there; start a new"
                    " cache, or take back all of it"
                )
        for seq, length in cut:
            self._stores[seq].truncate(length)
            self.tails.forget(seq)
            if self.fed.count:
                self.fed.hide_last(seq, self.seq_lengths[seq] - length)
            self.seq_lengths[seq] = length

    def crop(self, columns: int) -> None:
        """Take back columns, as transformers' caches do.

        Args:
            columns: -n takes back the last n, 0 none; n > 0 keeps the first n, as in transformers before 5.23.

        Raises:
            InputError: more columns than there are, no number, or see `truncate`.
        """
        try:
            columns = operator.index(columns)
        except TypeError:
            raise InputError(f"crop needs a number of columns, got {columns!r}") from None
        self.check_columns()
        count = columns if columns > 0 else self.fed.count + columns
        if not 0 <= count <= self.fed.count:
            raise InputError(f"crop({columns}) does not fit a cache of {self.fed.count} columns")
        if count == self.fed.count:
            return
        real = self.fed.real
        self.truncate([count] * self.batch_size if real is None else real[:, :count].sum(1).tolist())
        self.fed.crop(count)

    def check_columns(self) -> None:
        """Raise InputError where tokens were fed that no column stands for: by the engine, not by calls of a model."""
        if self.fed.count < max(self.seq_lengths):
            raise InputError("the cache was not filled by calls of the model alone, so its columns are not known")

    def reset(self) -> None:
        """Take back everything, also what a pass that failed has left."""
        for store in self._stores:
            store.truncate(0)
        self.seq_lengths = [0] * self.batch_size
        self.fed, self.tails = FedColumns(), FusionTails(self.tails.layers, self.batch_size)
        self.in_pass = False

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Let the sequences be those of indices [R], or of a mask [B], from now on; a sequence may be there often.

        Raises:
            InputError: an index of no sequence, or none at all.
        """
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool and tuple(indices.shape) == (self.batch_size,):
            indices = indices.nonzero().squeeze(-1)
        elif indices.dtype == torch.bool:
            raise InputError(f"a mask over the cache's {self.batch_size} sequences has shape {tuple(indices.shape)}")
        chosen = indices.tolist()
        if (
            indices.dim() != 1
            or not len(indices)
            or indices.is_floating_point()
            or not all(-self.batch_size <= seq < self.batch_size for seq in chosen)
        ):
            raise InputError(f"indices {chosen} do not choose among the cache's {self.batch_size} sequences")
        chosen = [seq % self.batch_size for seq in chosen]
        first = [chosen.index(seq) == place for place, seq in enumerate(chosen)]
        stores = self._stores
        self._stores = [
            stores[seq] if own else copy.deepcopy(stores[seq]) for seq, own in zip(chosen, first, strict=True)
        ]
        self.seq_lengths = [self.seq_lengths[seq] for seq in chosen]
        self.tails.take(chosen)
        self.fed.take_rows(torch.tensor(chosen, device=self.shape.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each sequence be there `repeats` times, one after another."""
        self.batch_select_indices([seq for seq in range(self.batch_size) for _ in range(repeats)])

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Do as `batch_select_indices`; transformers has both names."""
        self.batch_select_indices(beam_idx)

    def entries(self, layer_idx: int, seq: int) -> Entries:
        """Return one sequence's entries in one layer, oldest first."""
        store = self._stores[seq]
        return Entries(*store.keys_values(layer_idx), store.positions(layer_idx), store.masses(layer_idx))

    def entry_counts(self, layer_idx: int) -> list[int]:
        """Entries that each sequence has in a layer."""
        return [store.length(layer_idx) for store in self._stores]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values, positions, masses and tails, room to grow included."""
        return sum(store.nbytes for store in self._stores) + self.tails.nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes of what is held, without room to grow."""
        return sum(store.used_nbytes for store in self._stores) + self.tails.nbytes

    @property
    def num_entries(self) -> int:
        """Entries held, over all layers and sequences."""
        return sum(store.num_entries for store in self._stores)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen, padding included, as transformers' caches do."""
        return max(self.fed.count, *self.seq_lengths)
