"""Blocks of GGUF's quantized types taken apart into codes and scales, nothing rounded.

What the bytes of a block are is defined by ggml: `block_q4_0` and the others in ggml-common.h, read by the functions
`dequantize_row_*` in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quicksilver.weights.codes import GroupedCodes, Scales

_BITS_OF_BYTE = torch.arange(8, dtype=torch.uint8)


def decode(type_name: str, blocks: Tensor) -> GroupedCodes:
    """Return what the blocks of a matrix say; scales that are not finite are the caller's to find.

    Args:
        type_name: a quantized type's, such as "Q4_K".
        blocks: [out, blocks, bytes] uint8, the inputs of each output in turn.
    """
    return _DECODERS[type_name](blocks)


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """Return codes [out, blocks, codes]: of each run of bytes the low nibbles, then the high ones."""
    runs = packed.unflatten(-1, (-1, run))
    codes = packed.new_empty(*runs.shape[:-1], 2, run)
    torch.bitwise_and(runs, 15, out=codes[..., 0, :])
    torch.bitwise_right_shift(runs, 4, out=codes[..., 1, :])
    return codes.flatten(2)


def _with_fifth_bit(nibbles: Tensor, bits: Tensor) -> Tensor:
    """Return codes of five bits as codes of six whose last is 0; `bits` holds a fifth bit, 0 or 1, for each nibble."""
    return nibbles.bitwise_left_shift_(1).bitwise_or_(bits.bitwise_left_shift_(5).view_as(nibbles))


def _halves(blocks: Tensor, begin: int, count: int = 1) -> list[Tensor]:
    """Return float16 numbers that follow one another in a block, [out, blocks] each."""
    return list(blocks[..., begin : begin + 2 * count].contiguous().view(torch.float16).unbind(-1))


def _q4_0(blocks: Tensor) -> GroupedCodes:
    (steps,) = _halves(blocks, 0)
    return GroupedCodes(_nibbles(blocks[..., 2:], 16).flatten(1), 4, 32, Scales(steps, zero=8))


def _q4_1(blocks: Tensor) -> GroupedCodes:
    steps, least = _halves(blocks, 0, 2)
    return GroupedCodes(_nibbles(blocks[..., 4:], 16).flatten(1), 4, 32, Scales(steps, offsets=-least))


def _q5(blocks: Tensor, begin: int) -> Tensor:
    """Return the codes of Q5_0 and Q5_1: 32 fifth bits, then nibbles."""
    bits = (blocks[..., begin : begin + 4, None] >> _BITS_OF_BYTE).bitwise_and_(1)
    return _with_fifth_bit(_nibbles(blocks[..., begin + 4 :], 16), bits).flatten(1)


def _q5_0(blocks: Tensor) -> GroupedCodes:
    (steps,) = _halves(blocks, 0)
    return GroupedCodes(_q5(blocks, 2), 6, 32, Scales(steps, zero=32, factor=0.5))


def _q5_1(blocks: Tensor) -> GroupedCodes:
    steps, least = _halves(blocks, 0, 2)
    return GroupedCodes(_q5(blocks, 4), 6, 32, Scales(steps, offsets=-least, factor=0.5))


def _q8_0(blocks: Tensor) -> GroupedCodes:
    (steps,) = _halves(blocks, 0)
    return GroupedCodes((blocks[..., 2:] ^ 128).flatten(1), 8, 32, Scales(steps, zero=128))  # signed bytes plus 128


def _two_levels(blocks: Tensor, factor: float = 1.0) -> Scales:
    """Return the scales of Q4_K and Q5_K: eight scales and eight offsets of 6 bits, in 12 bytes."""
    block_steps, block_offsets = _halves(blocks, 0, 2)
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    steps = torch.cat((first & 63, third & 15 | first >> 2 & 48), -1)
    offsets = torch.cat((second & 63, third >> 4 | second >> 2 & 48), -1)
    return Scales(
        steps.flatten(1),
        offsets=offsets.flatten(1),
        block_steps=block_steps,
        block_offsets=block_offsets,
        factor=factor,
    )


def _q4_k(blocks: Tensor) -> GroupedCodes:
    return GroupedCodes(_nibbles(blocks[..., 16:], 32).flatten(1), 4, 32, _two_levels(blocks))


def _q5_k(blocks: Tensor) -> GroupedCodes:
    bits = (blocks[..., None, 16:48] >> _BITS_OF_BYTE[:, None]).bitwise_and_(1)
    codes = _with_fifth_bit(_nibbles(blocks[..., 48:], 32), bits)
    return GroupedCodes(codes.flatten(1), 6, 32, _two_levels(blocks, factor=0.5))


def _q6_k(blocks: Tensor) -> GroupedCodes:
    upper = (blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> _BITS_OF_BYTE[::2, None]).bitwise_and_(3)
    codes = _nibbles(blocks[..., :128], 64)
    codes.bitwise_or_(upper.bitwise_left_shift_(4).view_as(codes))
    steps, (block_steps,) = blocks[..., 192:208].contiguous().view(torch.int8), _halves(blocks, 208)
    return GroupedCodes(codes.flatten(1), 6, 16, Scales(steps.flatten(1), zero=32, block_steps=block_steps))


_DECODERS: dict[str, Callable[[Tensor], GroupedCodes]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
