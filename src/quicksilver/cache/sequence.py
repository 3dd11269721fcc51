"""One sequence's cache: its entries in all layers, its length, and the group of fused tokens that is still open."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quicksilver.cache.coded import decode, encode
from quicksilver.cache.layer import CacheShape, Entries, LayerEntries
from quicksilver.core.ragged import RaggedLayout
from quicksilver.errors import InputError

_SLACK_ROWS = 32


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one model from another, also once a cache has been saved and loaded; a copy is another model."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelIdentity:
        return ModelIdentity()


@dataclass(frozen=True)
class OpenGroup:
    """The last row that reached the fusion layer, which the token right behind it may still join."""

    layer_idx: int  # the layer after which tokens fuse
    position: int  # the row's logical position
    token_id: int  # the token there
    mass: int  # tokens that the row stands for
    hidden: Tensor  # [1, d] its state after the layer
    mean: Tensor | None  # [1, d] float32, mean over its tokens, None where no mean is used

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + (0 if self.mean is None else self.mean.nbytes)


class SequenceCache:
    """Keys and values of one sequence, each layer with a length of its own.

    It belongs to a model and the layout of its entries, not to a plan: plans that keep entries in the same bits may
    work over it in turn.
    """

    def __init__(self, shape: CacheShape, owner: ModelIdentity) -> None:
        self.shape = shape  # the model's layers, heads and dtype, and the bits of entries
        self.owner = owner  # the model; a step refuses a cache of another
        self.reset()

    def reset(self) -> None:
        """Take back everything, also what a pass that failed has left, and give back the memory."""
        self._layers = [LayerEntries(self.shape) for _ in range(self.shape.num_layers)]
        self.length = self._allocated = self._used = 0  # tokens seen; bytes
        self.num_entries = 0  # held, over all layers
        self.open_group: OpenGroup | None = None  # where tokens fuse and the last one may be absorbed yet: its row
        self.in_pass = False  # a pass has begun and not ended; if none is under way, it failed, and entries may lack
        self._joined = bytearray()  # by position: the token joined the one before it; False behind the end
        self._joinable = bytearray()  # by position: a token of a later pass could have joined it

    def unsupported_reason(self, shape: CacheShape, owner: ModelIdentity) -> str | None:
        """Return why a model cannot go on with this cache in a shape, None where it can."""
        if not self._layers:
            return "the cache was dropped"
        if self.owner != owner:
            return "the cache was written by another model"
        if self.shape != shape:
            return f"the cache keeps {_bits(self.shape)}, where the plan asks for {_bits(shape)}"
        if self.in_pass:
            return "an earlier pass over this cache failed and left it incomplete"
        return None

    def append(
        self, layer_idx: int, positions: Tensor, keys: Tensor, values: Tensor, masses: Tensor | None = None
    ) -> None:
        """Write entries of a layer after those it has; amortised cost O(M). One call, as every token makes it.

        Positions [M] ascend, behind those held; keys, rotated, and values are [M, num_kv_heads, head_dim]; masses [M]
        are the tokens that each stands for, None for one each.
        """
        layer, count = self._layers[layer_idx], positions.shape[0]
        start = layer.length
        end = start + count
        if end > layer.capacity:
            self._grow(layer, end)
        if layer.key_scales is None or layer.value_scales is None:
            layer.keys[start:end] = keys
            layer.values[start:end] = values
        else:
            layer.keys[start:end], layer.key_scales[start:end] = encode(keys)
            layer.values[start:end], layer.value_scales[start:end] = encode(values)
        layer.positions[start:end] = positions
        if masses is not None and layer.masses is None:
            self._add_masses(layer)
        if layer.masses is not None:
            layer.masses[start:end] = 1 if masses is None else masses
        layer.length = end
        self.num_entries += count
        self._used += count * layer.row_nbytes

    def entries(self, layer_idx: int) -> Entries:
        """Return a layer's entries, oldest first; views where they are kept as they are."""
        layer = self._layers[layer_idx]
        end, dtype = layer.length, self.shape.dtype
        keys, values = layer.keys[:end], layer.values[:end]
        if layer.key_scales is not None and layer.value_scales is not None:
            keys, values = decode(keys, layer.key_scales[:end], dtype), decode(values, layer.value_scales[:end], dtype)
        elif keys.dtype != dtype:
            keys, values = keys.to(dtype), values.to(dtype)
        return Entries(keys, values, layer.positions[:end], None if layer.masses is None else layer.masses[:end])

    def num_entries_in(self, layer_idx: int) -> int:
        return self._layers[layer_idx].length

    def advance(self, count: int, joinable: bool = False) -> None:
        """Count the tokens of a finished pass as seen; after a prefill, give back the room that it left.

        `joinable`: a later pass's token may join the group of the last one; else there is no open group.
        """
        if joinable:
            self._joinable += bytes(self.length - len(self._joinable)) + b"\x01" * count
        else:
            self.open_group = None
        if count > _SLACK_ROWS:
            for layer in self._layers:
                if layer.length < layer.capacity:
                    self._resize(layer, layer.length)
        self.length += count
        self.in_pass = False

    def join(self, positions: Sequence[int]) -> None:
        """Note that the tokens at these positions joined those before them."""
        if positions:
            self._joined += bytes(max(0, positions[-1] + 1 - len(self._joined)))
        for position in positions:
            self._joined[position] = True

    def retract(self, after_layer: int, position: int) -> None:
        """Forget the entries at `position`, which is the last so far, in the layers after `after_layer`."""
        deeper = [layer for layer in self._layers[after_layer + 1 :] if layer.length]
        last = torch.stack([layer.positions[layer.length - 1] for layer in deeper]).tolist() if deeper else []
        for layer, found in zip(deeper, last, strict=True):
            self._cut(layer, int(found == position))

    def kept(self, length: int) -> int:
        """Return how many tokens a cut to `length` keeps: so many but for fused tokens.

        A cut into a group keeps what is before the group. So does one right behind a group that a later pass could
        have gone on with: what of it that pass would need is known of the last token alone. Fed again, the same tokens
        make the group anew.

        Raises:
            InputError: a length that is not from 0 to the sequence's.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"a sequence of {self.length} tokens cannot be cut to {length}")
        if length in (0, self.length):
            return length
        known = self.open_group is not None and self.open_group.position == length - 1
        if _has(self._joined, length) or (_has(self._joinable, length - 1) and not known):
            length -= 1
            while _has(self._joined, length):
                length -= 1
        return length

    def truncate(self, length: int) -> int:
        """Take back tokens from the end, as if they had not been fed; return how many are kept, see `kept`.

        Where they are fewer than `length`, the same tokens up to there must be fed again.

        Raises:
            InputError: a length that is not from 0 to the sequence's.
        """
        length = self.kept(length)
        if length < self.length:
            fed = self.length - length  # in a layer there is at most one entry for each
            newest = [layer.positions[max(layer.length - fed, 0) : layer.length] for layer in self._layers]
            gone = torch.stack([(positions >= length).sum() for positions in newest]).tolist()
            for layer, count in zip(self._layers, gone, strict=True):
                self._cut(layer, count)
            if self.open_group is not None and self.open_group.position >= length:
                self.open_group = None
            del self._joined[length:], self._joinable[length:]
            self.length = length
        return length

    def drop(self) -> None:
        """Let go of everything; no step takes the cache any more."""
        self.reset()
        self._layers = []

    def copy(self) -> SequenceCache:
        """Return a cache of the same sequence that shares nothing that is written to."""
        copied = object.__new__(SequenceCache)
        copied.__dict__.update(self.__dict__)
        copied._layers = [layer.copy() for layer in self._layers]
        copied._allocated = self._used
        copied._joined, copied._joinable = self._joined[:], self._joinable[:]
        return copied

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceCache:
        return self.copy()

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values, positions, masses and the open group, room to grow included."""
        return self._allocated + (0 if self.open_group is None else self.open_group.nbytes)

    @property
    def used_nbytes(self) -> int:
        """Bytes of what is held, without room to grow."""
        return self._used + (0 if self.open_group is None else self.open_group.nbytes)

    def _cut(self, layer: LayerEntries, count: int) -> None:
        """Forget the last `count` entries of a layer."""
        layer.length -= count
        self.num_entries -= count
        self._used -= count * layer.row_nbytes

    def _grow(self, layer: LayerEntries, needed: int) -> None:
        """Make room; the first entries get exactly what they need."""
        self._resize(layer, needed + (max(_SLACK_ROWS, layer.length // 4) if layer.length else 0))

    def _resize(self, layer: LayerEntries, capacity: int) -> None:
        self._allocated += (capacity - layer.capacity) * layer.row_nbytes
        layer.resize(capacity)

    def _add_masses(self, layer: LayerEntries) -> None:
        before = layer.row_nbytes
        layer.add_masses()
        self._allocated += layer.capacity * (layer.row_nbytes - before)
        self._used += layer.length * (layer.row_nbytes - before)


def append_rows(
    caches: Sequence[SequenceCache],
    layer_idx: int,
    layout: RaggedLayout,
    keys: Tensor,
    values: Tensor,
    masses: Tensor | None = None,
) -> None:
    """Write entries of one layer of a layout's sequences: keys and values [N, num_kv_heads, head_dim], masses [N]."""
    if len(caches) == 1:
        caches[0].append(layer_idx, layout.positions, keys, values, masses)
        return
    start = 0
    for cache, length in zip(caches, layout.lengths, strict=True):
        rows, start = slice(start, start + length), start + length
        if length:
            own = None if masses is None else masses[rows]
            cache.append(layer_idx, layout.positions[rows], keys[rows], values[rows], own)


def extend(caches: Sequence[SequenceCache], layers: range, lengths: Sequence[int]) -> list[int]:
    """Add entries that a kernel is about to write after those held: `lengths[b]` of each sequence in each layer.

    One loop and not a call for each, as every decoded token makes it.

    Returns:
        For each layer and sequence, one after another: the addresses of all keys, values, scales of keys, scales of
        values, positions and masses (0 for scales or masses that there are not), and how many entries the layer held.
        Addresses are not to be kept: entries may move.
    """
    places: list[int] = []
    for layer_idx in layers:
        for cache, count in zip(caches, lengths, strict=True):
            layer = cache._layers[layer_idx]
            held = layer.length
            if held + count > layer.capacity:
                cache._grow(layer, held + count)
            layer.length = held + count
            cache.num_entries += count
            cache._used += count * layer.row_nbytes
            key_scales, value_scales, masses = layer.key_scales, layer.value_scales, layer.masses
            places += (
                layer.keys.data_ptr(),
                layer.values.data_ptr(),
                0 if key_scales is None else key_scales.data_ptr(),
                0 if value_scales is None else value_scales.data_ptr(),
                layer.positions.data_ptr(),
                0 if masses is None else masses.data_ptr(),
                held,
            )
    return places


def _has(marks: bytearray, position: int) -> bool:
    """Whether a position is marked; those behind the end are not."""
    return position < len(marks) and bool(marks[position])


def _bits(shape: CacheShape) -> str:
    return f"entries of {shape.entry_bits or 8 * shape.dtype.itemsize} bits"
