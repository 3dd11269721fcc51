"""Two ways of holding one sequence's entries: each layer its own, or one pool that layers refer to."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from quicksilver.cache.buffers import RowBuffer


class EntryStore(ABC):
    """Entries of one sequence in all layers.

    Args:
        num_layers: layers of the model.
        row_shape: (num_kv_heads, head_dim).
        dtype: of keys and values.
        device: where they live.
    """

    @abstractmethod
    def __init__(
        self, num_layers: int, row_shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None: ...

    @abstractmethod
    def append(self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, listed: Tensor) -> None:
        """Write [M] entries; `listed` are the positions the layer lists, a superset where entries are shared."""

    @abstractmethod
    def entries(self, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values [n, num_kv_heads, head_dim] and positions [n] of a layer."""

    @abstractmethod
    def length(self, layer_idx: int) -> int:
        """Return the number of entries a layer lists."""

    @property
    @abstractmethod
    def buffers(self) -> tuple[RowBuffer, ...]:
        """Everything that is allocated."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def used_nbytes(self) -> int:
        """Bytes of what is held, without room to grow."""
        return sum(buffer.used_nbytes for buffer in self.buffers)

    def trim(self) -> None:
        """Give back the room to grow."""
        for buffer in self.buffers:
            buffer.trim()


class OwnedEntries(EntryStore):
    """Each layer holds the keys and values of the tokens that wrote there."""

    def __init__(self, num_layers: int, row_shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._keys = [RowBuffer(row_shape, dtype, device) for _ in range(num_layers)]
        self._values = [RowBuffer(row_shape, dtype, device) for _ in range(num_layers)]
        self._positions = [RowBuffer((), torch.int32, device) for _ in range(num_layers)]

    def append(self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, listed: Tensor) -> None:
        """Write [M] entries of a layer."""
        self._keys[layer_idx].append(keys)
        self._values[layer_idx].append(values)
        self._positions[layer_idx].append(positions)

    def entries(self, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of a layer's keys, values and positions."""
        return self._keys[layer_idx].rows, self._values[layer_idx].rows, self._positions[layer_idx].rows

    def length(self, layer_idx: int) -> int:
        """Return the number of entries of a layer."""
        return self._positions[layer_idx].length

    @property
    def buffers(self) -> tuple[RowBuffer, ...]:
        """Keys, values and positions of each layer."""
        return (*self._keys, *self._values, *self._positions)


class SharedEntries(EntryStore):
    """One pool of keys and values for all layers; a layer is a list of slots in it."""

    def __init__(self, num_layers: int, row_shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._keys = RowBuffer(row_shape, dtype, device)
        self._values = RowBuffer(row_shape, dtype, device)
        self._newest = RowBuffer((), torch.int64, device)  # slot of each position's newest entry
        self._slots = [RowBuffer((), torch.int64, device) for _ in range(num_layers)]
        self._positions = [RowBuffer((), torch.int32, device) for _ in range(num_layers)]

    def append(self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, listed: Tensor) -> None:
        """Write [M] entries, then list `listed` at their newest slots."""
        first = self._keys.length
        slots = torch.arange(first, first + positions.shape[0], device=positions.device)
        self._keys.append(keys)
        self._values.append(values)
        if layer_idx == 0:  # every token runs the first layer, in order of position
            self._newest.append(slots)
        else:
            self._newest.rows.index_copy_(0, positions, slots)
        self._slots[layer_idx].append(self._newest.rows.index_select(0, listed))
        self._positions[layer_idx].append(listed)

    def entries(self, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a layer's keys and values, gathered, and its positions."""
        slots = self._slots[layer_idx].rows
        keys, values = (buffer.rows.index_select(0, slots) for buffer in (self._keys, self._values))
        return keys, values, self._positions[layer_idx].rows

    def length(self, layer_idx: int) -> int:
        """Return the number of entries a layer lists."""
        return self._positions[layer_idx].length

    @property
    def buffers(self) -> tuple[RowBuffer, ...]:
        """The pools, and each layer's slots and positions."""
        return (self._keys, self._values, self._newest, *self._slots, *self._positions)
