"""One layer's entries of one sequence, in tensors that grow geometrically: a token does not copy those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quicksilver.cache.coded import SCALE_BYTES, num_scales
from quicksilver.core.bits import ENTRY_BITS, HALF_BITS

_STORED = {HALF_BITS: torch.bfloat16, ENTRY_BITS: torch.int8}  # by the bits of a number


@dataclass(frozen=True)
class CacheShape:
    """What a cache must know of a model, and of a plan."""

    num_layers: int  # layers
    num_kv_heads: int  # heads of keys and values
    head_dim: int  # width of each
    dtype: torch.dtype  # of keys and values as they are written and read
    device: torch.device  # where they live
    # they are kept in so many: 8 for int8 codes with scales for groups of dimensions, 16 for bfloat16; None for their
    # own dtype
    entry_bits: int | None = None

    @property
    def coded(self) -> bool:
        return self.entry_bits == ENTRY_BITS

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry's key and value."""
        bits = 8 * self.dtype.itemsize if self.entry_bits is None else self.entry_bits
        scales = num_scales(self.head_dim) if self.coded else 0
        return 2 * self.num_kv_heads * (self.head_dim * bits // 8 + scales * SCALE_BYTES)


class Entries(NamedTuple):
    """One sequence's entries in one layer."""

    keys: Tensor  # [n, num_kv_heads, head_dim]
    values: Tensor  # like keys
    positions: Tensor  # [n] logical positions
    masses: Tensor | None  # [n] tokens that each entry stands for, None where each stands for one


class LayerEntries:
    """Tensors of one layer's entries, with room to grow; empty at first."""

    TENSORS = ("keys", "values", "key_scales", "value_scales", "positions", "masses")  # in the kernels' order
    __slots__ = ("capacity", "length", "row_nbytes", *TENSORS)

    def __init__(self, shape: CacheShape) -> None:
        stored = shape.dtype if shape.entry_bits is None else _STORED[shape.entry_bits]
        rows = torch.empty((0, shape.num_kv_heads, shape.head_dim), dtype=stored, device=shape.device)
        scales = rows.new_empty((*rows.shape[:2], num_scales(shape.head_dim)), dtype=torch.float32)
        self.length = self.capacity = 0  # entries held, and those that there is room for
        self.keys = self.values = rows  # [capacity, num_kv_heads, head_dim] as they are kept: floats, or int8 codes
        # [capacity, num_kv_heads, scales] of codes, None where there are none
        self.key_scales = self.value_scales = scales if shape.coded else None
        self.positions = rows.new_empty(0, dtype=torch.int32)  # [capacity]
        self.masses: Tensor | None = None  # [capacity] int32, None where each entry stands for one token
        self.row_nbytes = shape.entry_bytes + self.positions.element_size()  # of one entry, its mass included

    def resize(self, capacity: int) -> None:
        """Move what is held to tensors of their own, of another capacity; they outlive an inference mode."""
        with torch.inference_mode(False):
            for name in self.TENSORS:
                before: Tensor | None = getattr(self, name)
                if before is not None:
                    after = before.new_empty((capacity, *before.shape[1:]))
                    after[: self.length] = before[: self.length]
                    setattr(self, name, after)
        self.capacity = capacity

    def add_masses(self) -> None:
        """Keep masses from here on; each entry so far stands for one token."""
        self.masses = torch.ones_like(self.positions)
        self.row_nbytes += self.masses.element_size()

    def copy(self) -> LayerEntries:
        """Return the same entries in tensors of their own, without room to grow."""
        copied = object.__new__(LayerEntries)
        for name in self.__slots__:
            setattr(copied, name, getattr(self, name))
        copied.resize(self.length)
        return copied
