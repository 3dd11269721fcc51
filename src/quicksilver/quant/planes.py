"""Bit planes of 8-bit codes: the first two bits, the next two, and so on, each pair packed on its own."""

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.core.bits import MAX_BITS, WEIGHT_BITS

PLANE_BITS = (2, 2, 2, 2)
"""Bits of a code in each plane, leading bits first; MAX_BITS together."""

_PER_BYTE = 4  # codes
_FEW = 2**15 - 4  # codes packed at a time: what stays in the processor's cache, and in one thread

Planes = tuple[Tensor, ...]
"""Codes [in, out] as one uint8 tensor [in, ceil(out * bits / 8)] for each plane.

An input channel's bits are contiguous over the outputs; the first code of a byte is in its lowest bits.
"""


def num_planes(bits: int) -> int:
    """Return how many planes hold the leading bits, 0 to 8; ValueError for any other number."""
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"weights are read at 0 to {MAX_BITS} bits, not {bits}")
    return sum(start < bits for start in accumulate(PLANE_BITS[:-1], initial=0))


def run_bytes(num_outputs: int, bits: int) -> int:
    """Return the bytes of one input channel's codes read at `bits` bits."""
    return sum(-(-num_outputs * held // 8) for held in PLANE_BITS[: num_planes(bits)])


def split(codes: Tensor) -> Planes:
    """Pack codes ([in, out] uint8) into planes."""
    num_inputs, num_outputs = codes.shape
    planes = empty(num_inputs, num_outputs, codes.device)
    run, few = planes[0].shape[1], max(_FEW // max(num_outputs, 1), 1)
    for rows, *packed in zip(codes.split(few), *(plane.split(few) for plane in planes), strict=True):
        words = F.pad(rows, (0, run * _PER_BYTE - rows.shape[1])).view(torch.int32)  # four codes each
        for plane, end in zip(packed, accumulate(PLANE_BITS), strict=True):
            pairs = words >> (MAX_BITS - end)
            pairs &= 0x03030303  # two of each code, to be put side by side in the lowest byte
            pairs |= pairs >> 6
            pairs |= pairs >> 12
            plane.copy_(pairs & 0xFF)
    return planes


def empty(num_inputs: int, num_outputs: int, device: torch.device | str) -> Planes:
    """Return planes for codes [in, out] without content."""
    shape = num_inputs, -(-num_outputs // _PER_BYTE)
    return tuple(torch.empty(shape, dtype=torch.uint8, device=device) for _ in PLANE_BITS)


def join(planes: Planes, num_outputs: int, bits: int = MAX_BITS) -> Tensor:
    """Return the leading bits, one of `WEIGHT_BITS`, of every code, [in, out] uint8; reads only the planes needed."""
    if bits not in WEIGHT_BITS:
        raise ValueError(f"codes are read at {', '.join(map(str, WEIGHT_BITS))} bits, not {bits}")
    count = num_planes(bits)
    codes = _unpack(planes[0], PLANE_BITS[0], num_outputs)
    for plane, held in zip(planes[1:count], PLANE_BITS[1:count], strict=True):
        codes = codes << held | _unpack(plane, held, num_outputs)
    return codes


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(1)[:, :count]
