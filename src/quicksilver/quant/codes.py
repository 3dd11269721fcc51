"""Any-precision codes of a weight matrix: 8-bit integers whose leading bits are its narrower versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from quicksilver.core.bits import MAX_BITS
from quicksilver.core.checks import is_whole
from quicksilver.errors import ModelError
from quicksilver.quant import planes
from quicksilver.quant.blocks import Block, blocks
from quicksilver.quant.planes import Planes

GROUP_SIZES = (32, 64, 128)
STEPS_PER_OCTAVE = 16  # scales are powers of 2 ** (1 / 16): at most 4.4 % above what a group needs
MAX_CODE = 2**MAX_BITS - 1
_ROUNDING = 1.5 * 2**23  # added to a small float32 and taken away again, it rounds to whole numbers, ties to even
TABLE_BITS = (4, 2)
"""Bits whose levels are fitted by least squares and kept with the codes, in this order."""


def check_group_size(group_size: object) -> int:
    """Return a group size, or raise ModelError where it is none of `GROUP_SIZES`."""
    if not is_whole(group_size) or group_size not in GROUP_SIZES:
        raise ModelError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size!r}")
    return group_size


@dataclass(frozen=True)
class QuantGrid:
    """Where the levels of each group lie: code c of group (i, g) means `scales[i, g] * (c - zeros[i, g])`.

    A group is `group_size` adjacent outputs of one input channel; the last of a channel may be shorter. One channel
    has its own scales, so that bits can be chosen channel by channel and scales folded into the activation.
    """

    exponents: Tensor  # [in, groups] uint8, `scales = largest * 2 ** (-exponents / 16)`
    zeros: Tensor  # [in, groups] uint8, the code of zero
    largest: Tensor  # the largest scale, a float32 scalar
    group_size: int  # outputs of one group

    @classmethod
    def fit(cls, weight: Tensor, group_size: int) -> QuantGrid:
        """Fit levels to each group's range of a matrix [in, out]; ModelError where float32 does not hold them."""
        low, high = _ranges(weight, check_group_size(group_size))
        if not bool(torch.stack((low.amin(), high.amax())).isfinite().all()):
            raise ModelError("it holds NaN or infinite values")
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # zero is always a level
        needed = (high - low) / MAX_CODE
        largest = needed.max().clamp(min=torch.finfo(torch.float32).tiny)
        if not bool(torch.isfinite(largest * MAX_CODE)):
            raise ModelError("a group of its values spans more than the range of float32")
        octaves = torch.log2(largest / needed)  # infinite where a group is all zero
        exponents = (octaves * STEPS_PER_OCTAVE).floor().clamp(0, 255).to(torch.uint8)
        zeros = (-low / _scales(exponents, largest)).round().clamp(0, MAX_CODE)
        return cls(exponents, zeros.to(torch.uint8), largest, group_size)

    @property
    def scales(self) -> Tensor:
        """[in, groups] float32, the distance between two levels of 8-bit codes."""
        return self.scale_of(self.exponents)

    def scale_of(self, exponents: Tensor) -> Tensor:
        """Return the distance between two levels where an exponent is one of these, float32 of their shape."""
        return _scales(exponents, self.largest)

    def select(self, channels: Tensor) -> QuantGrid:
        exponents, zeros = (t.index_select(0, channels) for t in (self.exponents, self.zeros))
        return QuantGrid(exponents, zeros, self.largest, self.group_size)

    def spread(self, values: Tensor, num_outputs: int) -> Tensor:
        """Repeat each group's value over its outputs: [..., groups] to [..., out]."""
        return values.repeat_interleave(self.group_size, dim=-1)[..., :num_outputs]

    def levels_of(self, weight: Tensor) -> Tensor:
        """Return weights [in, out] in units of codes, unrounded."""
        scales, zeros = (self.spread(values, weight.shape[1]) for values in (self.scales, self.zeros.float()))
        return weight / scales + zeros

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the code of the level nearest to each weight, [in, out] uint8."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for block in blocks(weight.shape, self.group_size):
            levels = self.levels_in(block, weight).clamp_(0, MAX_CODE)
            nearest = levels.add_(_ROUNDING).sub_(_ROUNDING).to(torch.uint8)  # `round` itself is divided among threads
            codes[block.inputs, block.outputs] = nearest.flatten(0, 1).T.contiguous()
        return codes

    def levels_in(self, block: Block, weight: Tensor) -> Tensor:
        """Return what `levels_of` does of a block of a matrix, [groups, size, in]."""
        scales, zeros = self.scale_of(block.of_groups(self.exponents)), block.of_groups(self.zeros).float()
        return block.of(weight).div_(scales).add_(zeros)

    def weights_of(self, levels: Tensor) -> Tensor:
        """Return what levels [in, out], in units of codes, mean as weights, float32."""
        scales, zeros = (self.spread(values, levels.shape[1]) for values in (self.scales, self.zeros.float()))
        return scales * (levels - zeros)


def _ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value of each group of a matrix [in, out], [in, groups] float32 each."""
    num_inputs, num_outputs = weight.shape
    shape = -(-num_outputs // group_size), num_inputs
    low, high = (torch.empty(shape, dtype=torch.float32, device=weight.device) for _ in range(2))
    for block in blocks(weight.shape, group_size):
        values = block.of(weight)
        low[block.groups, block.inputs], high[block.groups, block.inputs] = values.amin(1), values.amax(1)
    return low.T.contiguous(), high.T.contiguous()


def _scales(exponents: Tensor, largest: Tensor) -> Tensor:
    """Return `largest * 2 ** (-exponents / 16)`, by a table: what `exp2` gives depends on its place in the tensor."""
    return largest * _factors(exponents.device)[exponents.int()]


@cache
def _factors(device: torch.device) -> Tensor:
    factors = [2.0 ** (-exponent / STEPS_PER_OCTAVE) for exponent in range(256)]
    return torch.tensor(factors, dtype=torch.float32, device=device)


def centres(bits: int) -> Tensor:
    """Return the middle of the 8-bit codes that begin with each prefix of `bits` bits, [2 ** bits] float32.

    Cutting a code off and reading it as it stands would shift every weight down by half a step of the narrower
    grid; its cell's middle does not.
    """
    cell = 2 ** (MAX_BITS - bits)
    return torch.arange(2**bits, dtype=torch.float32) * cell + (cell - 1) / 2


@dataclass(frozen=True)
class AnyPrecisionCodes:
    """A matrix [in, out] in any-precision codes."""

    planes: Planes  # the codes' bits
    grid: QuantGrid  # where their levels lie
    num_outputs: int  # out
    # for bits that have one, the level that each prefix stands for, [2 ** bits] float32 in units of 8-bit codes; other
    # bits read the middle of the cell
    tables: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def outline(cls, num_inputs: int, num_outputs: int, group_size: int) -> AnyPrecisionCodes:
        """Return a matrix without content, on "meta"."""
        of_groups = (num_inputs, -(-num_outputs // group_size))
        exponents, zeros = (torch.empty(of_groups, dtype=torch.uint8, device="meta") for _ in range(2))
        grid = QuantGrid(exponents, zeros, torch.empty((), device="meta"), group_size)
        return cls(planes.empty(num_inputs, num_outputs, "meta"), grid, num_outputs)

    @classmethod
    def pack(cls, codes: Tensor, grid: QuantGrid, tables: Mapping[int, Tensor] | None = None) -> AnyPrecisionCodes:
        """Pack codes [in, out], uint8."""
        return cls(planes.split(codes), grid, codes.shape[1], tables or {})

    def codes(self, bits: int = MAX_BITS) -> Tensor:
        """Return the leading `bits` bits of every code, [in, out] uint8."""
        return planes.join(self.planes, self.num_outputs, bits)

    def select(self, channels: Tensor, bits: int = MAX_BITS) -> AnyPrecisionCodes:
        needed = self.planes[: planes.num_planes(bits)]
        kept = tuple(plane.index_select(0, channels) for plane in needed)
        return AnyPrecisionCodes(kept, self.grid.select(channels), self.num_outputs, self.tables)

    def dequantize(self, bits: int = MAX_BITS) -> Tensor:
        """Return the matrix as `bits` bits tell it, [in, out] float32."""
        codes = self.codes(bits)
        if bits == MAX_BITS:
            return self.grid.weights_of(codes.float())
        table = self.tables[bits] if bits in self.tables else centres(bits)
        return self.grid.weights_of(table.to(codes.device)[codes.int()])
