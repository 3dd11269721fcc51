"""Two ways of holding one sequence's entries: each layer its own, or one pool that layers refer to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from quicksilver.cache.buffers import Account, RowBuffer
from quicksilver.cache.coded import CodedRowBuffer

EntryRows = RowBuffer | CodedRowBuffer
"""Holds keys, or values."""


class EntryStore(ABC):
    """Entries of one sequence in all layers.

    Args:
        num_layers: layers of the model.
        new_rows: returns an empty buffer of keys or values, part of an account.
        device: where they live.
    """

    def __init__(self, num_layers: int, new_rows: Callable[[Account], EntryRows], device: torch.device) -> None:
        self._account = Account()
        self._listed = Account()  # of positions alone
        self._positions = [RowBuffer((), torch.int32, device, self._listed) for _ in range(num_layers)]
        self._masses: dict[int, RowBuffer] = {}  # of layers that hold an entry for several tokens

    @abstractmethod
    def _append(self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, listed: Tensor) -> None:
        """Write [M] entries; `listed` are the positions the layer lists, a superset where entries are shared."""

    @abstractmethod
    def _drop_last(self, layers: list[int]) -> None:
        """Forget the last key and value of each of these layers."""

    @abstractmethod
    def _keep(self, counts: list[int], length: int) -> None:
        """Forget all but the first keys and values of each layer, those of positions below `length`."""

    @abstractmethod
    def keys_values(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [n, num_kv_heads, head_dim] of a layer."""

    @property
    @abstractmethod
    def _key_value_buffers(self) -> tuple[EntryRows, ...]:
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
        if masses is not None and layer_idx not in self._masses:
            self._masses[layer_idx] = RowBuffer((), torch.int32, listed.device, self._account)
            self._masses[layer_idx].append(torch.ones_like(self._positions[layer_idx].rows))
        if layer_idx in self._masses:
            self._masses[layer_idx].append(torch.ones_like(listed) if masses is None else masses)
        self._positions[layer_idx].append(listed)

    def extend(self, layer_idx: int, count: int) -> tuple[int, ...]:
        """Add entries that a kernel is about to write after those held.

        Returns:
            Addresses of all keys, values, scales of keys, scales of values, positions and masses (0 for scales or
            masses that there are not), and how many entries the layer held.

        Raises:
            NotImplementedError: the layer has no keys and values of its own.
        """
        positions, masses = self._positions[layer_idx], self._masses.get(layer_idx)
        held = positions.length
        (keys, key_scales), (values, value_scales) = self._extend(layer_idx, count)
        of_masses = 0 if masses is None else masses.extend(count)
        return keys, values, key_scales, value_scales, positions.extend(count), of_masses, held

    def _extend(self, layer_idx: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
        raise NotImplementedError(f"{type(self).__name__} refers to entries")

    def drop_last(self, layers: list[int]) -> None:
        """Forget the last entry of each of these layers."""
        self._drop_last(layers)
        for layer_idx in layers:
            self._positions[layer_idx].length -= 1
            if layer_idx in self._masses:
                self._masses[layer_idx].length -= 1

    def truncate(self, length: int) -> None:
        """Forget the entries of all layers at positions from `length` on."""
        counts = self._counts_below(length)
        self._keep(counts, length)
        for layer_idx, count in enumerate(counts):
            self._positions[layer_idx].length = count
            if layer_idx in self._masses:
                self._masses[layer_idx].length = count

    def splits_group(self, length: int) -> bool:
        """Whether an entry stands for tokens on both sides of position `length`, or may do so.

        Fused tokens are neighbours among those that ran on, and their entry is at the last one's position. Whether a
        token before it that has no entry belongs to it or has halted, the entries do not say.
        """
        counts = self._counts_below(length)
        for layer_idx, masses in self._masses.items():
            count, positions = counts[layer_idx], self.positions(layer_idx)
            if count < len(positions) and int(masses.rows[count]) > 1:
                last_kept = int(positions[count - 1]) if count else -1
                if last_kept < length - 1:
                    return True
        return False

    def _counts_below(self, length: int) -> list[int]:
        """Return how many entries each layer has at positions below `length`; positions ascend."""
        counts = [(self.positions(layer_idx) < length).sum() for layer_idx in range(len(self._positions))]
        return torch.stack(counts).tolist()

    def positions(self, layer_idx: int) -> Tensor:
        """Return the positions of a layer's entries, [n]."""
        return self._positions[layer_idx].rows

    def masses(self, layer_idx: int) -> Tensor | None:
        """Return how many tokens each entry of a layer stands for, [n]; None where each stands for one."""
        return self._masses[layer_idx].rows if layer_idx in self._masses else None

    def length(self, layer_idx: int) -> int:
        """Return the number of entries a layer lists."""
        return self._positions[layer_idx].length

    @property
    def buffers(self) -> tuple[EntryRows, ...]:
        """Everything that is allocated."""
        return (*self._key_value_buffers, *self._positions, *self._masses.values())

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return self._account.allocated + self._listed.allocated

    @property
    def used_nbytes(self) -> int:
        """Bytes of what is held, without room to grow."""
        return self._account.used + self._listed.used

    @property
    def num_entries(self) -> int:
        """Entries listed, over all layers."""
        return self._listed.used // self._positions[0].row_nbytes

    def trim(self) -> None:
        """Give back the room to grow."""
        for buffer in self.buffers:
            buffer.trim()


class OwnedEntries(EntryStore):
    """Each layer holds the keys and values of the tokens that wrote there."""

    def __init__(self, num_layers: int, new_rows: Callable[[Account], EntryRows], device: torch.device) -> None:
        super().__init__(num_layers, new_rows, device)
        self._keys = [new_rows(self._account) for _ in range(num_layers)]
        self._values = [new_rows(self._account) for _ in range(num_layers)]

    def _append(self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, listed: Tensor) -> None:
        self._keys[layer_idx].append(keys)
        self._values[layer_idx].append(values)

    def _extend(self, layer_idx: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return self._keys[layer_idx].extend_coded(count), self._values[layer_idx].extend_coded(count)

    def _drop_last(self, layers: list[int]) -> None:
        for layer_idx in layers:
            self._keys[layer_idx].length -= 1
            self._values[layer_idx].length -= 1

    def _keep(self, counts: list[int], length: int) -> None:
        for buffers in (self._keys, self._values):
            for buffer, count in zip(buffers, counts, strict=True):
                buffer.length = count

    def keys_values(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, views where they are kept as they are."""
        return self._keys[layer_idx].rows, self._values[layer_idx].rows

    @property
    def _key_value_buffers(self) -> tuple[EntryRows, ...]:
        return (*self._keys, *self._values)


class SharedEntries(EntryStore):
    """One pool of keys and values for all layers; a layer is a list of slots in it."""

    def __init__(self, num_layers: int, new_rows: Callable[[Account], EntryRows], device: torch.device) -> None:
        super().__init__(num_layers, new_rows, device)
        self._keys = new_rows(self._account)
        self._values = new_rows(self._account)
        self._newest = RowBuffer((), torch.int64, device, self._account)  # slot of each position's newest entry
        self._slots = [RowBuffer((), torch.int64, device, self._account) for _ in range(num_layers)]
        self._free = torch.empty(0, dtype=torch.int64, device=device)  # slots of the pool that nobody lists any more

    def _append(self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, listed: Tensor) -> None:
        slots = self._place(keys, values)
        if layer_idx == 0:  # every token runs the first layer, in order of position
            self._newest.append(slots)
        else:
            self._newest.rows.index_copy_(0, positions, slots)
        self._slots[layer_idx].append(self._newest.rows.index_select(0, listed))

    def _place(self, keys: Tensor, values: Tensor) -> Tensor:
        """Store rows [M] in the pool, in free slots where there are enough; return their slots."""
        count, first = keys.shape[0], self._keys.length
        if 0 < count <= self._free.shape[0]:
            slots, self._free = self._free[:count], self._free[count:]
            self._keys.put(slots, keys)
            self._values.put(slots, values)
            return slots
        self._keys.append(keys)
        self._values.append(values)
        return torch.arange(first, first + count, device=keys.device)

    def _drop_last(self, layers: list[int]) -> None:
        """Unlist the last entry of each layer; all that list one slot are among them, so it is free."""
        if layers:
            slots = torch.stack([self._slots[layer_idx].rows[-1] for layer_idx in layers])
            self._free = torch.cat((self._free, slots.unique()))
        for layer_idx in layers:
            self._slots[layer_idx].length -= 1

    def _keep(self, counts: list[int], length: int) -> None:
        """Free the slots of all entries that go: every slot that a position has had is listed in some layer."""
        gone = [slots.rows[count:] for slots, count in zip(self._slots, counts, strict=True)]
        self._free = torch.cat((self._free, torch.cat(gone).unique()))
        for slots, count in zip(self._slots, counts, strict=True):
            slots.length = count
        self._newest.length = min(self._newest.length, length)

    @property
    def used_nbytes(self) -> int:
        """Bytes of what is held, without room to grow and free slots."""
        return super().used_nbytes - self._free.shape[0] * (self._keys.row_nbytes + self._values.row_nbytes)

    def keys_values(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, gathered."""
        slots = self._slots[layer_idx].rows
        return self._keys.take(slots), self._values.take(slots)

    @property
    def _key_value_buffers(self) -> tuple[EntryRows, ...]:
        return (self._keys, self._values, self._newest, *self._slots)
