"""A matrix in blocks: what is computed of one stays in the processor's cache, and in one thread.

Temporaries as large as the matrix cost more time, in pages that the system must give, than what is computed in them.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_OUTPUTS, _INPUTS = 128, 224  # whole groups of every size; fewer numbers together than PyTorch divides among threads


class Block(NamedTuple):
    """Some of a matrix's outputs and inputs."""

    outputs: slice  # they are whole groups
    inputs: slice  # channels
    groups: slice  # those of the outputs
    size: int  # outputs of each of these groups; the last group of a channel may have fewer, and is a block of its own

    def of(self, matrix: Tensor) -> Tensor:
        """Return what it is of a matrix [in, out], [groups, size, in] contiguous float32."""
        part = matrix.T[self.outputs, self.inputs]
        copied = torch.empty(part.shape, dtype=torch.float32, device=part.device).copy_(part)
        return copied.unflatten(0, (-1, self.size))

    def of_groups(self, values: Tensor) -> Tensor:
        """Return what it is of values [in, groups] of each group, [groups, 1, in] contiguous."""
        return values.T[self.groups, self.inputs].contiguous()[:, None]


def blocks(shape: Sequence[int], group_size: int) -> Iterator[Block]:
    """Yield the blocks of a matrix of shape [in, out]."""
    num_inputs, num_outputs = shape
    whole = num_outputs // group_size * group_size
    for first in range(0, num_inputs, _INPUTS):
        inputs = slice(first, min(first + _INPUTS, num_inputs))
        for begin in range(0, whole, _OUTPUTS):
            end = min(begin + _OUTPUTS, whole)
            yield Block(slice(begin, end), inputs, slice(begin // group_size, end // group_size), group_size)
        if whole < num_outputs:
            last = whole // group_size
            yield Block(slice(whole, num_outputs), inputs, slice(last, last + 1), num_outputs - whole)
