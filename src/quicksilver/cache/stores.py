"""One sequence's entries: keys, values, positions and masses of each layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quicksilver.cache.buffers import Account, RowBuffer, extend_all
from quicksilver.cache.coded import CodedRowBuffer

_PARTS, _POSITIONS = 6, 4  # buffers of a layer as kernels take them, and which of them holds positions

EntryRows = RowBuffer | CodedRowBuffer
"""Holds keys, or values."""


class EntryStore:
    """Entries of one sequence in all layers; each holds the keys and values of the tokens that wrote there.

    Args:
        num_layers: layers of the model.
        new_rows: returns an empty buffer of keys or values, part of an account.
        device: where they live.
    """

    def __init__(self, num_layers: int, new_rows: Callable[[Account], EntryRows], device: torch.device) -> None:
        self._account = Account()
        self._of_positions = Account()  # of positions alone
        self._positions = [RowBuffer((), torch.int32, device, self._of_positions) for _ in range(num_layers)]
        self._masses: dict[int, RowBuffer] = {}  # of layers that hold an entry for several tokens
        self._keys = [new_rows(self._account) for _ in range(num_layers)]
        self._values = [new_rows(self._account) for _ in range(num_layers)]
        self._parts: list[list[RowBuffer | None]] = []
        for keys, values, positions in zip(self._keys, self._values, self._positions, strict=True):
            (key_rows, key_scales), (value_rows, value_scales) = keys.parts(), values.parts()
            self._parts.append([key_rows, value_rows, key_scales, value_scales, positions])

    def append(self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, masses: Tensor | None) -> None:
        """Write [M] entries of a layer.

        Args:
            layer_idx: the layer.
            positions: [M].
            keys: [M, num_kv_heads, head_dim].
            values: like keys.
            masses: [M] tokens that each of them stands for, None for one each.
        """
        self._keys[layer_idx].append(keys)
        self._values[layer_idx].append(values)
        if masses is not None and layer_idx not in self._masses:
            self._masses[layer_idx] = RowBuffer((), torch.int32, positions.device, self._account)
            self._masses[layer_idx].append(torch.ones_like(self._positions[layer_idx].rows))
        if layer_idx in self._masses:
            self._masses[layer_idx].append(torch.ones_like(positions) if masses is None else masses)
        self._positions[layer_idx].append(positions)

    def extend(self, layers: range, count: int) -> list[list[int]]:
        """Add entries that a kernel is about to write after those held.

        Returns:
            For each layer the addresses of all keys, values, scales of keys, scales of values, positions and masses (0
            for scales or masses that there are not), and how many entries the layer held.
        """
        buffers: list[RowBuffer | None] = []
        for layer_idx in layers:
            buffers += self._parts[layer_idx]
            buffers.append(self._masses.get(layer_idx))
        addresses, held = extend_all(buffers, count)
        return [[*addresses[at : at + _PARTS], held[at + _POSITIONS]] for at in range(0, len(buffers), _PARTS)]

    def drop_last(self, layers: list[int]) -> None:
        """Forget the last entry of each of these layers."""
        for layer_idx in layers:
            for buffer in self._of_layer(layer_idx):
                buffer.length -= 1

    def truncate(self, length: int) -> None:
        """Forget the entries of all layers at positions from `length` on."""
        for layer_idx, count in enumerate(self._counts_below(length)):
            for buffer in self._of_layer(layer_idx):
                buffer.length = count

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

    def _of_layer(self, layer_idx: int) -> tuple[EntryRows, ...]:
        """Return what a layer's entries are kept in."""
        masses = self._masses.get(layer_idx)
        own = self._keys[layer_idx], self._values[layer_idx], self._positions[layer_idx]
        return own if masses is None else (*own, masses)

    def _counts_below(self, length: int) -> list[int]:
        """Return how many entries each layer has at positions below `length`; positions ascend."""
        counts = [(self.positions(layer_idx) < length).sum() for layer_idx in range(len(self._positions))]
        return torch.stack(counts).tolist()

    def keys_values(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [n, num_kv_heads, head_dim] of a layer, views where they are kept as they are."""
        return self._keys[layer_idx].rows, self._values[layer_idx].rows

    def positions(self, layer_idx: int) -> Tensor:
        """Return the positions of a layer's entries, [n]."""
        return self._positions[layer_idx].rows

    def masses(self, layer_idx: int) -> Tensor | None:
        """Return how many tokens each entry of a layer stands for, [n]; None where each stands for one."""
        return self._masses[layer_idx].rows if layer_idx in self._masses else None

    def length(self, layer_idx: int) -> int:
        """Return the number of a layer's entries."""
        return self._positions[layer_idx].length

    @property
    def buffers(self) -> tuple[EntryRows, ...]:
        """Everything that is allocated."""
        return (*self._keys, *self._values, *self._positions, *self._masses.values())

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return self._account.allocated + self._of_positions.allocated

    @property
    def used_nbytes(self) -> int:
        """Bytes of what is held, without room to grow."""
        return self._account.used + self._of_positions.used

    @property
    def num_entries(self) -> int:
        """Entries held, over all layers."""
        return self._of_positions.used // self._positions[0].row_nbytes

    def trim(self) -> None:
        """Give back the room to grow."""
        for buffer in self.buffers:
            buffer.trim()
