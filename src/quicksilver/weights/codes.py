"""A matrix as codes in groups along its inputs: what other programs' files hold, and what quantizing makes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from quicksilver.core.checks import is_whole
from quicksilver.errors import ModelError

GROUP_SIZES = (16, 32, 64, 128)
"""Inputs that may share a scale."""

CODE_BITS = (4, 6, 8)
"""Bits that codes may have. Of 5, they are six whose last is 0, so that their leading four are their 4-bit version."""

BLOCK = 256
"""Inputs that share the half-precision scales of scales in two levels."""


def check_group_size(group_size: object) -> int:
    """Return a group size, or raise ModelError where it is none of `GROUP_SIZES`."""
    if not is_whole(group_size) or group_size not in GROUP_SIZES:
        raise ModelError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size!r}")
    return group_size


@dataclass(frozen=True)
class Scales:
    """What codes stand for: a code c of output o in group g means `scale[o, g] * c - offset[o, g]`.

    Scales come in one level, or in two: small whole numbers times a half-precision scale of each block of 256 inputs,
    as in GGUF's K-quants. Offsets come likewise, or are `scale * zero`. All products are exact in float32.
    """

    steps: Tensor  # [out, groups] float16; or uint8 or int8, times `block_steps`
    zero: int | Tensor | None = (
        None  # the code of zero: one number, or [out, groups] uint8; None where there are offsets
    )
    offsets: Tensor | None = None  # [out, groups] float16; or uint8, times `block_offsets`
    block_steps: Tensor | None = None  # [out, ceil(in / 256)] float16
    block_offsets: Tensor | None = None  # likewise
    factor: float = 1.0  # of all scales, not of offsets: a power of two, 0.5 where codes of 5 bits are kept as six

    def rows(self, index: Tensor) -> Scales:
        """Return those of some outputs [n], in the index's order."""
        parts = {name: value.index_select(0, index) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **parts)

    def expand(self, group_size: int) -> tuple[Tensor, Tensor]:
        """Return scale and offset of each group, [out, groups] float32 each."""
        scale = self.steps.float() * self.factor
        if self.block_steps is not None:
            scale = scale * _of_groups(self.block_steps, group_size, scale.shape[1])
        if self.offsets is None:
            zero = self.zero if isinstance(self.zero, int) else _present(self.zero).float()
            return scale, scale * zero
        offset = self.offsets.float()
        if self.block_offsets is not None:
            offset = offset * _of_groups(self.block_offsets, group_size, offset.shape[1])
        return scale, offset

    def weights_of(self, levels: Tensor, group_size: int) -> Tensor:
        """Return what levels [out, in] float32, in units of codes, mean as weights, float32."""

        def of_inputs(of_groups: Tensor) -> Tensor:
            return of_groups.repeat_interleave(group_size, dim=1)[:, : levels.shape[1]]

        scale, offset = self.expand(group_size)
        if self.offsets is not None:
            return levels * of_inputs(scale) - of_inputs(offset)
        zero = self.zero if isinstance(self.zero, int) else of_inputs(_present(self.zero)).float()
        return (levels - zero) * of_inputs(scale)  # so that a negative scale's zero is -0.0


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _of_groups(of_blocks: Tensor, group_size: int, num_groups: int) -> Tensor:
    return of_blocks.float().repeat_interleave(BLOCK // group_size, dim=1)[:, :num_groups]


@dataclass(frozen=True)
class GroupedCodes:
    """A matrix [out, in] in unsigned codes; `group_size` adjacent inputs of an output share a scale.

    The last group of an output may be shorter. Codes of fewer bits than `bits` are in the upper ones.

    Raises:
        ModelError: sizes or types that do not fit together.
    """

    codes: Tensor  # [out, in] uint8, below 2 ** bits
    bits: int  # 4, 6 or 8
    group_size: int  # 16, 32, 64 or 128
    scales: Scales

    def __post_init__(self) -> None:
        if self.bits not in CODE_BITS or self.group_size not in GROUP_SIZES:
            raise ModelError(f"codes of {self.bits} bits in groups of {self.group_size} are not supported")
        num_outputs, num_inputs = self.codes.shape
        groups, blocks = -(-num_inputs // self.group_size), -(-num_inputs // BLOCK)
        for name, value in vars(self.scales).items():
            width = blocks if name.startswith("block") else groups
            if isinstance(value, Tensor) and tuple(value.shape) != (num_outputs, width):
                raise ModelError(f"{name} have shape {list(value.shape)}, not {[num_outputs, width]}")

    @property
    def num_outputs(self) -> int:
        """Rows of the matrix."""
        return self.codes.shape[0]

    @property
    def num_inputs(self) -> int:
        """Columns of the matrix."""
        return self.codes.shape[1]

    def rows(self, index: Tensor) -> GroupedCodes:
        """Return some outputs [n], in the index's order, nothing rounded anew."""
        return replace(self, codes=self.codes.index_select(0, index), scales=self.scales.rows(index))

    def dequantize(self) -> Tensor:
        """Return the weights, [out, in] float32: what the file that they come from says, to the last bit."""
        return self.scales.weights_of(self.codes.float(), self.group_size)
