"""Where the bits of codes lie: planes in which an input channel, or a unit of a few, is one run over all outputs.

The leading four bits of all codes are one plane, the rest another, of two bits or of four. In a plane, units of
channels follow one another; in a unit, tiles of 64 outputs; in a tile, its channels' bits, 32 bytes each of four bits
or 16 of two. Units of four channels and more have those of each four interleaved, as dot products take them. So what
is left out by unit leaves a gap of at least a page of memory, which is what saves time: of shorter gaps the processor
reads ahead what nobody asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 64
"""Outputs whose codes of one channel lie together."""

UNITS = (1, 4, 8, 16, 32)
"""How many channels may be one unit."""

HIGH_BITS = 4
"""Bits of the first plane."""

_QUAD = 4  # channels that a dot product's word holds
_PAGE = 4096  # bytes
_PACKED_TILES = 64  # packed at a time


def unit_of(num_outputs: int, bits: int) -> int:
    """Return how many channels are a unit, so that its run in each plane is a page.

    Args:
        num_outputs: of all matrices whose channels are decided together.
        bits: 4, 6 or 8 of each code.
    """
    narrowest = min(HIGH_BITS, bits - HIGH_BITS or HIGH_BITS)
    run = padded(num_outputs) * narrowest // 8
    return next((unit for unit in UNITS if unit * run >= _PAGE), UNITS[-1])


def padded(num_outputs: int) -> int:
    """Return the outputs of whole tiles."""
    return -(-num_outputs // TILE) * TILE


def pack(codes: Tensor, bits: int, unit: int) -> tuple[Tensor, Tensor | None]:
    """Pack codes [out, in] uint8 of so many bits.

    Returns:
        The plane of the leading four bits, [units, tiles, unit, 32] uint8, and that of the rest, [units, tiles, unit,
        8 * (bits - 4)], None where there are no more.
    """
    num_outputs, num_inputs = codes.shape
    tiles, rest = padded(num_outputs) // TILE, bits - HIGH_BITS
    shape = -(-num_inputs // unit), tiles, unit
    high = torch.empty((*shape, 8 * HIGH_BITS), dtype=torch.uint8, device=codes.device)
    low = torch.empty((*shape, 8 * rest), dtype=torch.uint8, device=codes.device) if rest else None
    for first in range(0, tiles, _PACKED_TILES):  # a few: copies of all codes would be large
        some, outputs = slice(first, first + _PACKED_TILES), slice(first * TILE, (first + _PACKED_TILES) * TILE)
        part = codes[outputs]
        # [units, unit, tiles, half, eighth, quarter, place]: output 32 * half + 8 * eighth + 4 * quarter + place
        whole = F.pad(part, (0, -num_inputs % unit, 0, -len(part) % TILE)).T.contiguous()
        whole = whole.view(-1, unit, *_shape(len(part)))
        high[:, some] = _nibbles(whole >> rest)
        if low is not None:
            low[:, some] = _nibbles(whole & 15) if rest == 4 else _pairs(whole & 3)
    return high, low


def _shape(num_outputs: int) -> tuple[int, ...]:
    return padded(num_outputs) // TILE, 2, 4, 2, 4


def _nibbles(codes: Tensor) -> Tensor:
    low, high = codes.unbind(3)  # [units, unit, tiles, eighth, quarter, place]
    packed = low | high << 4
    return _laid((packed if packed.shape[1] >= _QUAD else packed.transpose(-2, -3)).flatten(3))


def _pairs(codes: Tensor) -> Tensor:
    first, second = codes.unbind(3)
    fields = first[..., 0, :] | second[..., 0, :] << 2 | first[..., 1, :] << 4 | second[..., 1, :] << 6
    return _laid(fields.flatten(3))


def _laid(packed: Tensor) -> Tensor:
    """Return [units, tiles, unit, bytes] of [units, unit, tiles, bytes], bytes of each four channels interleaved."""
    by_tile = packed.transpose(1, 2)
    if packed.shape[1] >= _QUAD:
        by_tile = by_tile.unflatten(2, (-1, _QUAD)).transpose(-1, -2).flatten(3).view(by_tile.shape)
    return by_tile.contiguous()


def _taken(plane: Tensor) -> Tensor:
    """Return [units, unit, tiles, bytes] of what `_laid` gave."""
    if plane.shape[2] >= _QUAD:
        plane = plane.unflatten(2, (-1, _QUAD)).flatten(3).unflatten(3, (-1, _QUAD)).transpose(-1, -2).flatten(2, 3)
    return plane.transpose(1, 2)


def unpack(high: Tensor, low: Tensor | None, num_outputs: int, num_inputs: int) -> Tensor:
    """Return the codes [out, in] uint8 that `pack` packed; those of four bits where the second plane is not given."""
    codes = _from_nibbles(high)
    if low is not None:
        wide = low.shape[-1] == high.shape[-1]
        codes = codes << 4 | _from_nibbles(low) if wide else codes << 2 | _from_pairs(low)
    units, unit = codes.shape[:2]  # [units, unit, tiles, half, eighth, quarter, place]
    return codes.reshape(units * unit, -1).T[:num_outputs, :num_inputs]


def _from_nibbles(plane: Tensor) -> Tensor:
    packed = _taken(plane)
    interleaved = packed.shape[1] >= _QUAD
    packed = packed.unflatten(-1, (4, 2, 4)) if interleaved else packed.unflatten(-1, (2, 4, 4)).transpose(-2, -3)
    return torch.stack((packed & 15, packed >> 4), dim=3)


def _from_pairs(plane: Tensor) -> Tensor:
    packed = _taken(plane).unflatten(-1, (4, 1, 4))
    halves = [torch.cat((packed >> shift & 3, packed >> shift + 4 & 3), dim=-2) for shift in (0, 2)]
    return torch.stack(halves, dim=3)


def unpack_rows(high: Tensor, low: Tensor | None, outputs: Tensor, num_inputs: int) -> Tensor:
    """Return the codes [n, in] uint8 of some outputs [n] int64; no more than these is read."""
    tile, at = outputs // TILE, outputs % TILE
    half, eighth, quarter, place = at // 32, at % 32 // 8, at % 8 // 4, at % 4
    interleaved = high.shape[2] >= _QUAD
    byte = eighth * 8 + quarter * 4 + place if interleaved else quarter * 16 + eighth * 4 + place
    codes = _bytes_at(high, tile, byte) >> (4 * half).to(torch.uint8)[:, None] & 15
    if low is not None and low.shape[-1] == high.shape[-1]:
        codes = codes << 4 | _bytes_at(low, tile, byte) >> (4 * half).to(torch.uint8)[:, None] & 15
    elif low is not None:
        shift = (2 * half + 4 * quarter).to(torch.uint8)[:, None]
        codes = codes << 2 | _bytes_at(low, tile, eighth * 4 + place) >> shift & 3
    return codes[:, :num_inputs]


def _bytes_at(plane: Tensor, tile: Tensor, byte: Tensor) -> Tensor:
    """Return the bytes of all channels at places [n] of tiles [n], [n, in]."""
    if plane.shape[2] < _QUAD:
        return plane[:, tile, :, byte].flatten(1)
    quads = plane.unflatten(2, (-1, _QUAD)).flatten(3).unflatten(3, (-1, _QUAD))  # [units, tiles, quads, bytes, 4]
    return quads[:, tile, :, byte].flatten(1)
