"""A batch of sequences' caches, as calls of the model and transformers' tools see it: rows and padded columns."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from quicksilver.cache.columns import FedColumns
from quicksilver.cache.layer import CacheShape, Entries
from quicksilver.cache.sequence import SequenceCache
from quicksilver.errors import InputError


class RaggedKVCache:
    """Caches of a batch of sequences, of which a step may take any, and the columns that they were fed."""

    def __init__(self, sequences: Sequence[SequenceCache]) -> None:
        self.sequences = list(sequences)
        self.fed = FedColumns()

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.sequences)

    @property
    def shape(self) -> CacheShape:
        """The model's layers, heads and dtype, and the bits of entries."""
        return self.sequences[0].shape

    @property
    def seq_lengths(self) -> list[int]:
        """Tokens that each sequence has seen."""
        return [sequence.length for sequence in self.sequences]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Take back the last tokens of sequences, as if they had not been fed; each keeps so many.

        Raises:
            InputError: a length that is not from 0 to the sequence's, or a cut through a group of fused tokens, or
                behind tokens that what comes next may fuse with; then nothing is taken back.
        """
        if len(lengths) != self.batch_size:
            raise InputError(f"{len(lengths)} lengths were given for a cache of {self.batch_size} sequences")
        for seq, (sequence, length) in enumerate(zip(self.sequences, lengths, strict=True)):
            if not 0 <= length <= sequence.length:
                raise InputError(f"sequence {seq} holds {sequence.length} tokens; it cannot be cut to {length}")
            if sequence.kept(length) != length:
                raise InputError(
                    f"sequence {seq} cannot be cut to {length} tokens: the plan has fused tokens there; start a new"
                    " cache, or take back all of it"
                )
        for seq, (sequence, length) in enumerate(zip(self.sequences, lengths, strict=True)):
            if self.fed.count and length < sequence.length:
                self.fed.hide_last(seq, sequence.length - length)
            sequence.truncate(length)

    def crop(self, columns: int) -> None:
        """Take back columns, as transformers' caches do: -n takes back the last n, 0 none; n > 0 keeps the first n.

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
        real = self.fed.real
        columns = [self.fed.count] * self.batch_size if real is None else real.sum(1).tolist()
        if columns != self.seq_lengths:
            raise InputError("the cache was not filled by calls of the model alone, so its columns are not known")

    def reset(self) -> None:
        """Take back everything, also what a pass that failed has left."""
        for sequence in self.sequences:
            sequence.reset()
        self.fed = FedColumns()

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Let the sequences be those of indices [R], or of a mask [B], some often; InputError for no such one."""
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
        again = [seq in chosen[:place] for place, seq in enumerate(chosen)]
        self.sequences = [
            self.sequences[seq].copy() if copied else self.sequences[seq]
            for seq, copied in zip(chosen, again, strict=True)
        ]
        self.fed.take_rows(torch.tensor(chosen, device=self.shape.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each sequence be there `repeats` times, one after another."""
        self.batch_select_indices([seq for seq in range(self.batch_size) for _ in range(repeats)])

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Do as `batch_select_indices`; transformers has both names."""
        self.batch_select_indices(beam_idx)

    def entries(self, layer_idx: int, seq: int) -> Entries:
        return self.sequences[seq].entries(layer_idx)

    def entry_counts(self, layer_idx: int) -> list[int]:
        return [sequence.num_entries_in(layer_idx) for sequence in self.sequences]

    @property
    def nbytes(self) -> int:
        return sum(sequence.nbytes for sequence in self.sequences)

    @property
    def used_nbytes(self) -> int:
        return sum(sequence.used_nbytes for sequence in self.sequences)

    @property
    def num_entries(self) -> int:
        return sum(sequence.num_entries for sequence in self.sequences)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen, padding included, as transformers' caches do."""
        return max(self.fed.count, *self.seq_lengths)
