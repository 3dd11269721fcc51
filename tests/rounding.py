"""What the kernels make of activations before they multiply: for definitions that are to be theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.weights import AnyPrecisionLinear

GROUP = 16  # inputs that share a scale


def rounded(x: Tensor, read: Tensor | None = None) -> Tensor:
    """Return rows [N, in] in 8 bits for each group of inputs, as floats; `read` [N, in] says which are multiplied."""
    if read is not None:
        x = torch.where(read, x, 0.0)
    groups = F.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(2, keepdim=True)
    inverse = torch.where(largest > 1e-34, torch.full_like(largest, 127.0) / largest, 0.0)  # not times 1 / x
    codes = (groups * inverse).round().clamp(-127, 127)
    return (codes * (largest * (1.0 / 127.0))).flatten(1)[:, : x.shape[1]]


@contextmanager
def rounding_as_kernels() -> Iterator[None]:
    """Let PyTorch's products of quantized maps round activations as the kernels do."""
    by_bits = AnyPrecisionLinear._by_bits

    def rounds(self: AnyPrecisionLinear, x: Tensor, bits: int | Tensor, *rest: object) -> Tensor:
        read = bits > 0 if isinstance(bits, Tensor) and bits.dim() == 2 else None
        return by_bits(self, rounded(x, read), bits, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnyPrecisionLinear, "_by_bits", rounds)
        yield
