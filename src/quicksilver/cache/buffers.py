"""Row buffers that grow geometrically, so that appending one row does not copy the rest.

A buffer knows nothing of layers, sequences or attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SLACK_ROWS = 32


class Account:
    """Bytes of several buffers together.

    Attributes:
        allocated: room to grow included.
        used: of the rows held.
    """

    __slots__ = ("allocated", "used")

    def __init__(self) -> None:
        self.allocated = 0
        self.used = 0


class RowBuffer:
    """Rows of one shape in one allocation; the first append allocates exactly what it needs.

    Args:
        row_shape: shape of one row.
        dtype: element type.
        device: where the rows live.
        account: of what the buffer's bytes are part, None for nothing.

    Attributes:
        row_nbytes: bytes of one row.
        nbytes: bytes allocated, room to grow included.
    """

    def __init__(
        self, row_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, account: Account | None = None
    ) -> None:
        self._account = Account() if account is None else account
        self._length = 0
        self.nbytes = 0
        self.row_nbytes = math.prod(row_shape) * dtype.itemsize
        self._hold(torch.empty((0, *row_shape), dtype=dtype, device=device))

    @property
    def length(self) -> int:
        """Rows held; rows may be taken off the end by making it less."""
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        self._account.used += (length - self._length) * self.row_nbytes
        self._length = length

    def append(self, rows: Tensor) -> None:
        """Add rows [M, *row_shape]; amortised cost O(M)."""
        end = self.length + rows.shape[0]
        if end > self._capacity:
            self._grow(end)
        self._storage[self.length : end] = rows
        self.length = end

    def parts(self) -> tuple[RowBuffer, RowBuffer | None]:
        """Return what holds the rows and what holds their scales, which floats have not."""
        return self, None

    @property
    def kept(self) -> Tensor:
        """[length, *row_shape] the rows held as they are stored, a view."""
        return self._storage[: self.length]

    @property
    def rows(self) -> Tensor:
        """[length, *row_shape] the rows held, a view."""
        return self.kept

    @property
    def used_nbytes(self) -> int:
        """Bytes of the rows held."""
        return self.length * self.row_nbytes

    def trim(self) -> None:
        """Give back the room to grow."""
        if self.length < self._capacity:
            self._hold(self.kept.clone())

    def _grow(self, needed: int) -> None:
        slack = max(_SLACK_ROWS, self.length // 4) if self.length else 0
        storage = self._storage.new_empty((needed + slack, *self._storage.shape[1:]))
        storage[: self.length] = self.kept
        self._hold(storage)

    def _hold(self, storage: Tensor) -> None:
        self._storage, self._capacity = storage, storage.shape[0]
        nbytes = self._capacity * self.row_nbytes
        self._account.allocated += nbytes - self.nbytes
        self.nbytes = nbytes


def extend_all(buffers: Sequence[RowBuffer | None], count: int) -> tuple[list[int], list[int]]:
    """Add `count` rows, which a kernel is about to write, to each of several buffers.

    A decoded token extends some in every layer, so this is one loop and not a call for each.

    Returns:
        For each buffer the address of its first row of all and how many rows it held; 0 and 0 for None. Addresses are
        not to be kept: rows may move.
    """
    addresses, held = [0] * len(buffers), [0] * len(buffers)
    for place, buffer in enumerate(buffers):
        if buffer is not None:
            held[place] = before = buffer._length
            if before + count > buffer._capacity:
                buffer._grow(before + count)
            buffer._length = before + count
            buffer._account.used += count * buffer.row_nbytes
            addresses[place] = buffer._storage.data_ptr()
    return addresses, held
