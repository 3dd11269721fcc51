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
        fuses: entries may stand for several tokens, so how many is kept too.
    """

    def __init__(
        self, num_layers: int, row_shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fuses: bool
    ) -> None:
        self._positions = [RowBuffer((), torch.int32, device) for _ in range(num_layers)]
        self._masses = [RowBuffer((), torch.int32, device) for _ in range(num_layers)] if fuses else []
        self._fused = [False] * num_layers

    @abstractmethod
    def _append(self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, listed: Tensor) -> None:
        """Write [M] entries; `listed` are the positions the layer lists, a superset where entries are shared."""

    @abstractmethod
    def _drop_last(self, layer_idx: int) -> None:
        """Forget a layer's last key and value."""

    @abstractmethod
    def keys_values(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [n, num_kv_heads, head_dim] of a layer."""

    @property
    @abstractmethod
    def _key_value_buffers(self) -> tuple[RowBuffer, ...]:
        """What is allocated for keys, values and where to find them."""

    def append(
        self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, listed: Tensor, masses: Tensor | None
    ) -> None:
        """Write [M] entries of a layer.

        Args:
            layer_idx: the layer.
            positions: [M] of the keys and values.
            keys: [M, num_kv_heads, head_dim].
            values: like keys.
            listed: [m] positions that the layer lists from now on, `positions` included.
            masses: [m] tokens that each of them stands for, None for one each.
        """
        self._append(layer_idx, positions, keys, values, listed)
        self._positions[layer_idx].append(listed)
        if self._masses:
            self._fused[layer_idx] |= masses is not None
            self._masses[layer_idx].append(torch.ones_like(listed) if masses is None else masses)

    def drop_last(self, layer_idx: int) -> None:
        """Forget a layer's last entry."""
        self._drop_last(layer_idx)
        self._positions[layer_idx].length -= 1
        self._masses[layer_idx].length -= 1

    def positions(self, layer_idx: int) -> Tensor:
        """Return the positions of a layer's entries, [n]."""
        return self._positions[layer_idx].rows

    def masses(self, layer_idx: int) -> Tensor | None:
        """Return how many tokens each entry of a layer stands for, [n]; None where each stands for one."""
        return self._masses[layer_idx].rows if self._fused[layer_idx] else None

    def length(self, layer_idx: int) -> int:
        """Return the number of entries a layer lists."""
        return self._positions[layer_idx].length

    @property
    def buffers(self) -> tuple[RowBuffer, ...]:
        """Everything that is allocated."""
        return (*self._key_value_buffers, *self._positions, *self._masses)

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

    def __init__(
        self, num_layers: int, row_shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fuses: bool
    ) -> None:
        super().__init__(num_layers, row_shape, dtype, device, fuses)
        self._keys = [RowBuffer(row_shape, dtype, device) for _ in range(num_layers)]
        self._values = [RowBuffer(row_shape, dtype, device) for _ in range(num_layers)]

    def _append(self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, listed: Tensor) -> None:
        self._keys[layer_idx].append(keys)
        self._values[layer_idx].append(values)

    def _drop_last(self, layer_idx: int) -> None:
        self._keys[layer_idx].length -= 1
        self._values[layer_idx].length -= 1

    def keys_values(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return views of a layer's keys and values."""
        return self._keys[layer_idx].rows, self._values[layer_idx].rows

    @property
    def _key_value_buffers(self) -> tuple[RowBuffer, ...]:
        return (*self._keys, *self._values)


class SharedEntries(EntryStore):
    """One pool of keys and values for all layers; a layer is a list of slots in it."""

    def __init__(
        self, num_layers: int, row_shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fuses: bool
    ) -> None:
        super().__init__(num_layers, row_shape, dtype, device, fuses)
        self._keys = RowBuffer(row_shape, dtype, device)
        self._values = RowBuffer(row_shape, dtype, device)
        self._newest = RowBuffer((), torch.int64, device)  # slot of each position's newest entry
        self._slots = [RowBuffer((), torch.int64, device) for _ in range(num_layers)]

    def _append(self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, listed: Tensor) -> None:
        first = self._keys.length
        slots = torch.arange(first, first + positions.shape[0], device=positions.device)
        self._keys.append(keys)
        self._values.append(values)
        if layer_idx == 0:  # every token runs the first layer, in order of position
            self._newest.append(slots)
        else:
            self._newest.rows.index_copy_(0, positions, slots)
        self._slots[layer_idx].append(self._newest.rows.index_select(0, listed))

    def _drop_last(self, layer_idx: int) -> None:
        """Unlist the last entry, and give its place back where it is the pool's last.

        Layers that list the same place are asked from the deepest on, so nothing listed is given back.
        """
        slot = int(self._slots[layer_idx].rows[-1])
        self._slots[layer_idx].length -= 1
        if slot == self._keys.length - 1:
            self._keys.length -= 1
            self._values.length -= 1

    def keys_values(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, gathered."""
        slots = self._slots[layer_idx].rows
        return self._keys.rows.index_select(0, slots), self._values.rows.index_select(0, slots)

    @property
    def _key_value_buffers(self) -> tuple[RowBuffer, ...]:
        return (self._keys, self._values, self._newest, *self._slots)
