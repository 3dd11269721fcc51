"""Products with any-precision weights for the kernels' tests: matrices, what they should give, how far off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.ops import native
from quicksilver.ops.any_precision_linear import StoredMatrix, check_rows, multiply, native_matrix
from quicksilver.weights import AnyPrecisionLinear
from quicksilver.weights.codes import BLOCK, GroupedCodes, Scales
from tests import tolerances
from tests.rounding import rounded

INSTRUCTION_SETS: tuple[str, ...] = native.instruction_sets() if native.is_available() else ()

Bits = int | Tensor
"""What is read: one number, [N] for each row, or [N, in] for each channel."""

_SUBNORMAL = 2.0**-149  # float32's least: what is as small is off by as much
_ODD_HALVES = (0.0, -0.0, 2.0**-24, -(2.0**-24), 37 * 2.0**-24, 2.0**-14, -0.5, 1000.0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_bits(*shape: int, seed: int = 0) -> Tensor:
    """Return bits from 0 to 8, even, uint8."""
    return 2 * draw_whole(0, 5, *shape, seed=seed).to(torch.uint8)


def draw_whole(first: int, end: int, *shape: int, seed: int = 0) -> Tensor:
    """Return whole numbers from `first` to `end` - 1, those two more often than others, int64."""
    generator = torch.Generator().manual_seed(seed)
    numbers, odd = torch.randint(first, end, shape, generator=generator), torch.rand(shape, generator=generator)
    return torch.where(odd < 0.1, first, torch.where(odd > 0.9, end - 1, numbers))


def draw_halves(*shape: int, seed: int = 0) -> Tensor:
    """Return half-precision numbers, among them zeros, negative and subnormal ones, and large ones."""
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor(_ODD_HALVES)[torch.randint(0, len(_ODD_HALVES), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.1, odd, 0.01 * draw(*shape, seed=seed)).half()


def _zero(out: int, groups: int, _: int, bits: int, seed: int) -> Scales:
    return Scales(draw_halves(out, groups, seed=seed), 2 ** (bits - 1))


def _zeros(out: int, groups: int, _: int, bits: int, seed: int) -> Scales:
    zeros = draw_whole(0, 2**bits, out, groups, seed=seed + 1).to(torch.uint8)
    return Scales(draw_halves(out, groups, seed=seed), zeros)


def _offsets(out: int, groups: int, _: int, __: int, seed: int) -> Scales:
    return Scales(draw_halves(out, groups, seed=seed), None, draw_halves(out, groups, seed=seed + 1))


def _two_levels(out: int, groups: int, blocks: int, _: int, seed: int) -> Scales:
    steps, offsets = (draw_whole(0, 256, out, groups, seed=seed + i).to(torch.uint8) for i in (0, 1))
    return Scales(
        steps, None, offsets, draw_halves(out, blocks, seed=seed + 2), draw_halves(out, blocks, seed=seed + 3)
    )


def _zeros_in_blocks(out: int, groups: int, blocks: int, bits: int, seed: int) -> Scales:
    steps, zeros = (
        draw_whole(0, end, out, groups, seed=seed + i).to(torch.uint8) for i, end in enumerate((256, 2**bits))
    )
    return Scales(steps, zeros, None, 1000 * draw_halves(out, blocks, seed=seed + 2).clamp(-1, 1), factor=2.0**-20)


def _signed(out: int, groups: int, blocks: int, bits: int, seed: int) -> Scales:
    steps = draw_whole(-128, 128, out, groups, seed=seed).to(torch.int8)
    return Scales(steps, 2 ** (bits - 1), None, draw_halves(out, blocks, seed=seed + 1))


FORMS: dict[str, Callable[[int, int, int, int, int], Scales]] = {
    "zero": _zero,
    "zeros": _zeros,
    "offsets": _offsets,
    "two levels": _two_levels,
    "zeros in blocks": _zeros_in_blocks,
    "signed": _signed,
}
"""Kinds of scales: of outputs, groups, blocks, bits and a seed."""


def module(
    num_inputs: int,
    num_outputs: int,
    bits: int = 8,
    group_size: int = 32,
    form: str = "offsets",
    unit: int | None = None,
    seed: int = 1,
) -> AnyPrecisionLinear:
    """Return a map without bias of random codes and scales, odd ones among them; no matrix was rounded to it."""
    groups, blocks = -(-num_inputs // group_size), -(-num_inputs // BLOCK)
    scales = FORMS[form](num_outputs, groups, blocks, bits, seed)
    if bits == 6:
        scales = replace(scales, factor=scales.factor / 2)  # as codes of five bits have it
    codes = draw_whole(0, 2**bits, num_outputs, num_inputs, seed=seed).to(torch.uint8)
    return AnyPrecisionLinear(GroupedCodes(codes, bits, group_size, scales), None, unit)


def plain(codes: Tensor, bits: int, group_size: int = 32, unit: int | None = None) -> AnyPrecisionLinear:
    """Return a map whose weights are codes [out, in] themselves."""
    steps = torch.ones(codes.shape[0], -(-codes.shape[1] // group_size), dtype=torch.float16)
    return AnyPrecisionLinear(GroupedCodes(codes, bits, group_size, Scales(steps, 0)), None, unit)


def spread(bits: Bits, x: Tensor) -> Tensor:
    """Return bits channel by channel, [N, in]."""
    each = torch.full((len(x), 1), bits, dtype=torch.uint8) if isinstance(bits, int) else bits
    return each.view(len(x), -1).expand_as(x)


def of_rows(bits: Bits, rows: slice) -> Bits:
    """Return the bits of some rows."""
    return bits if isinstance(bits, int) else bits[rows]


def weights(linear: AnyPrecisionLinear, bits: int) -> tuple[Tensor, Tensor]:
    """Return weights as `bits` bits tell them, [out, in] float64, and the size of what they are the difference of."""
    codes, zero = linear.codes, linear.codes.scales.zero

    def of_inputs(of_groups: Tensor) -> Tensor:
        return of_groups.double().repeat_interleave(codes.group_size, 1)[:, : codes.num_inputs]

    scale, offset = (of_inputs(t) for t in codes.scales.expand(codes.group_size))
    if zero is not None:
        offset = scale * (of_inputs(zero) if isinstance(zero, Tensor) else zero)
    cell = 2 ** max(codes.bits - bits, 0)
    levels = (codes.codes // cell * cell).double() + (cell - 1) / 2
    return levels * scale - offset, levels * scale.abs() + offset.abs()


def expected(linear: AnyPrecisionLinear, x: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Return the product that defines the operator, and how far off float32 may be, [N, out] float64 each."""
    y, bound = torch.zeros(2, len(x), linear.num_outputs, dtype=torch.float64)
    each = spread(bits, x)
    activations = rounded(x, each > 0).double()
    finest = 127 * _SUBNORMAL / linear.codes.scales.factor  # kernels multiply units by the factor first
    for value in WEIGHT_BITS:
        read = torch.where(each == value, activations, 0.0)
        if bool(read.any()):
            weight, size = weights(linear, value)
            y += read @ weight.T
            bound += (tolerances.PRODUCT * read.abs() + finest * (read != 0)) @ size.T
    return y, bound + linear.num_inputs * _SUBNORMAL


def assert_close(y: Tensor, linear: AnyPrecisionLinear, x: Tensor, bits: Bits) -> None:
    """Fail where a product is further from its definition than float32 explains."""
    wanted, bound = expected(linear, x, bits)
    excess = (y.double() - wanted).abs() - bound
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


def product(matrix: AnyPrecisionLinear | StoredMatrix, x: Tensor, bits: Bits = 8) -> Tensor:
    """Return rows times a matrix by the instruction set in use, checked as a module's are."""
    each, uniform = (None, bits) if isinstance(bits, int) else (bits, 8)
    stored = matrix if isinstance(matrix, StoredMatrix) else matrix.stored
    check_rows(x, stored.num_inputs, each, uniform)
    return multiply(x, native_matrix(stored), each, uniform)


def products(matrix: AnyPrecisionLinear | StoredMatrix, x: Tensor, bits: Bits = 8) -> Tensor:
    """Return the same from every instruction set, which must agree in every bit."""
    found: list[Tensor] = []
    for isa in INSTRUCTION_SETS:
        with using(isa):
            found.append(product(matrix, x, bits))
        assert torch.equal(found[-1], found[0]), f"{isa} differs from {INSTRUCTION_SETS[0]}"
    return found[0]
