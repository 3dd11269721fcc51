"""What the kernels round to bfloat16 is what PyTorch's conversion makes of it: ties, NaN and infinity among it."""

from __future__ import annotations

import pytest
import torch

from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.ops import native
from quicksilver.ops.any_precision_linear import expand, prepared
from quicksilver.quant import AnyPrecisionLinear
from quicksilver.quant.codes import AnyPrecisionCodes, QuantGrid, centres
from tests.ops.any_precision import INSTRUCTION_SETS, random_codes, using

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")
ISAS = pytest.mark.parametrize("isa", INSTRUCTION_SETS)
OUTPUTS = 293  # whole vectors of every instruction set, and some left over


def of_scale(largest: float) -> AnyPrecisionLinear:
    """Return a map whose weights are all codes from 0 to 255, and less, times one scale."""
    codes = (torch.arange(3 * OUTPUTS) % 256).to(torch.uint8).view(3, OUTPUTS)
    groups = -(-OUTPUTS // 32)
    zeros = torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None].expand(3, groups).contiguous()
    grid = QuantGrid(torch.zeros(3, groups, dtype=torch.uint8), zeros, torch.tensor(largest), 32)
    tables = {bits: centres(bits).round().clamp(0, 255) for bits in (4, 2)}
    return AnyPrecisionLinear(AnyPrecisionCodes.pack(codes, grid, tables), None)


def assert_rounded(linear: AnyPrecisionLinear, bits: int = 8) -> torch.Tensor:
    """Fail where an expansion to bfloat16 is not the one to float32, rounded; return the latter."""
    matrix = prepared(linear.stored)
    exact, rounded = (expand(matrix, bits, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, exact.to(torch.bfloat16), atol=0, rtol=0, equal_nan=True)
    return exact


@ISAS
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_weights_of_every_width_are_rounded(isa: str, bits: int) -> None:
    with using(isa):
        assert_rounded(random_codes(70, 300), bits)


@ISAS
@pytest.mark.parametrize("scale", [1.5, -1.5, 1.5 * 2.0**-130])
def test_ties_go_to_even(isa: str, scale: float) -> None:
    """1.5 times an odd code lies half way between two neighbours, from 128 on; below 2**-126 more of them do."""
    with using(isa):
        bits = assert_rounded(of_scale(scale)).view(torch.int32)
    ties = (bits & 0xFFFF) == 0x8000
    assert bool((ties & ((bits & 0x10000) != 0)).any())  # to be rounded up
    assert bool((ties & ((bits & 0x10000) == 0)).any())  # and down


@ISAS
def test_what_is_too_large_becomes_infinite_and_nan_stays(isa: str) -> None:
    largest = torch.finfo(torch.float32).max
    with using(isa):
        beyond = assert_rounded(of_scale(largest / 255))  # 255 times it is finite, and above bfloat16's largest
        assert bool((beyond.isfinite() & beyond.to(torch.bfloat16).isinf()).any())
        assert bool(assert_rounded(of_scale(largest)).isinf().any())
        assert bool(assert_rounded(of_scale(float("inf"))).isnan().any())  # 0 times infinity
        assert bool(assert_rounded(of_scale(float("nan"))).isnan().all())
