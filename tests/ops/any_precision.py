"""Products with any-precision weights for the kernels' tests: matrices, what they should give, how far off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.ops import native
from quicksilver.ops.any_precision_linear import StoredMatrix, check_rows, multiply, prepared
from quicksilver.quant import AnyPrecisionLinear
from quicksilver.quant.codes import AnyPrecisionCodes, QuantGrid, centres
from quicksilver.quant.rounding import quantize

INSTRUCTION_SETS = native.instruction_sets() if native.is_available() else ()

_CHUNK = 64  # neighbouring channels whose coefficients share a unit
_STEPS = 127 * 256 / 2 ** (1 / 16)  # units in the largest product of an activation and its channel's largest scale
_FLOATS = 2e-6  # of the sum of magnitudes: roundings of float32 on the way


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_bits(*shape: int, seed: int = 0) -> Tensor:
    """Return bits from 0 to 8, even, uint8."""
    return 2 * torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def module(
    num_inputs: int, num_outputs: int, group_size: int = 32, seed: int = 1, spread: float = 1.0
) -> AnyPrecisionLinear:
    """Return a map without bias whose channels differ in size by up to `spread`, so that its scales do too."""
    weight = draw(num_inputs, num_outputs, seed=seed) * torch.logspace(0.0, spread, num_inputs)[:, None]
    return AnyPrecisionLinear(quantize(weight, group_size), None)


def random_codes(num_inputs: int, num_outputs: int, group_size: int = 32, seed: int = 0) -> AnyPrecisionLinear:
    """Return a map of random codes, scales and zeros, extremes among them; no matrix was rounded to it."""
    generator = torch.Generator().manual_seed(seed)

    def bytes_of(*shape: int) -> Tensor:
        drawn = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        extremes = torch.where(drawn < 128, 0, 255).to(torch.uint8)
        return torch.where(torch.rand(shape, generator=generator) < 0.2, extremes, drawn)

    groups = -(-num_outputs // group_size)
    grid = QuantGrid(bytes_of(num_inputs, groups), bytes_of(num_inputs, groups), torch.tensor(0.37), group_size)
    tables = {bits: centres(bits).round().clamp(0, 255) for bits in (4, 2)}
    return AnyPrecisionLinear(AnyPrecisionCodes.pack(bytes_of(num_inputs, num_outputs), grid, tables), None)


def expected(linear: AnyPrecisionLinear, x: Tensor, bits: Tensor) -> Tensor:
    """Return the product that defines the operator, [N, out] float64."""
    y = torch.zeros(x.shape[0], linear.num_outputs, dtype=torch.float64)
    for value in WEIGHT_BITS:
        y += torch.where(bits == value, x, 0.0).double() @ linear.codes.dequantize(value).double()
    return y


def bounds(linear: AnyPrecisionLinear, x: Tensor, bits: Tensor) -> Tensor:
    """Return how far the kernels may be from the definition, [N, out] float64.

    A coefficient, activation times scale, is off by two units at most: half a unit for the activation, half for the
    product, one for the scale. What it multiplies is a level less a zero.
    """
    grid, out = linear.codes.grid, linear.num_outputs
    scales, zeros = (grid.spread(t, out).double() for t in (grid.scales, grid.zeros.float()))
    limit = torch.zeros(x.shape[0], out, dtype=torch.float64)
    for row in range(x.shape[0]):
        magnitudes = x[row].double().abs() * (bits[row] > 0)
        reach = torch.zeros_like(scales)
        for value in WEIGHT_BITS:
            levels = linear.codes.dequantize(value).double() / scales + zeros
            reach += (levels - zeros).abs() * (bits[row] == value)[:, None]
        blocks = zip(*(t.split(_CHUNK) for t in (magnitudes, scales, reach)), strict=True)
        for activation, scale, multiplied in blocks:
            unit = (activation * scale.amax(1)).amax() / _STEPS
            limit[row] += 2.001 * unit * multiplied.sum(0) + _FLOATS * (activation[:, None] * scale * multiplied).sum(0)
    return limit


def assert_close(y: Tensor, linear: AnyPrecisionLinear, x: Tensor, bits: Tensor) -> None:
    """Fail where a product is further from its definition than the kernels' rounding explains."""
    excess = (y.double() - expected(linear, x, bits)).abs() - bounds(linear, x, bits)
    assert bool((excess <= 0).all()), f"beyond the bound by up to {float(excess.nan_to_num(float('inf')).max()):.3g}"


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Use an instruction set as long as the context lasts."""
    before = native.instruction_set()
    try:
        native.use_instruction_set(isa)
        yield
    finally:
        native.use_instruction_set(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch, and so the kernels, use some threads as long as the context lasts."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def product(x: Tensor, stored: StoredMatrix, bits: int | Tensor) -> Tensor:
    """Return rows times a matrix, checked as a module's are."""
    each, uniform = (None, bits) if isinstance(bits, int) else (bits, 8)
    matrix = prepared(stored, by_channel=each is not None and each.dim() == 2)
    check_rows(x, stored, each, uniform)
    return multiply(x, matrix, each, uniform)
