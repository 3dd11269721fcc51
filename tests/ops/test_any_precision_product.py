"""The kernels' products at all bits equal their definition to float32's rounding, and are the same on every set."""

from __future__ import annotations

from itertools import product as pairs

import pytest
import torch
from torch import Tensor

from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.ops import native
from quicksilver.ops.any_precision_linear import native_matrix
from quicksilver.weights import AnyPrecisionLinear
from quicksilver.weights.codes import CODE_BITS, GROUP_SIZES
from quicksilver.weights.planes import UNITS
from quicksilver.weights.rounding import quantize
from tests import tolerances
from tests.ops.any_precision import (
    FORMS,
    INSTRUCTION_SETS,
    Bits,
    assert_close,
    draw,
    draw_bits,
    expected,
    module,
    of_rows,
    plain,
    product,
    products,
    threads,
    using,
    weights,
)

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")

SHAPES = ((1, 1), (3, 5), (7, 64), (37, 129), (64, 65), (70, 200), (129, 256), (257, 100), (130, 513))  # in, out
ISAS = pytest.mark.parametrize("isa", INSTRUCTION_SETS)


def choices(rows: int, num_inputs: int, seed: int = 5) -> tuple[Bits, ...]:
    """Return bits of all kinds: of everything, by row and by channel."""
    return 8, 6, 4, 2, draw_bits(rows, seed=seed), draw_bits(rows, num_inputs, seed=seed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_kind_of_matrix_equals_the_definition_on_every_instruction_set(bits: int, form: str) -> None:
    for i, (unit, group_size) in enumerate(pairs(UNITS, GROUP_SIZES)):
        num_inputs, num_outputs = SHAPES[(i + bits) % len(SHAPES)]
        linear, x = module(num_inputs, num_outputs, bits, group_size, form, unit, seed=i), draw(3, num_inputs, seed=i)
        for read in choices(3, num_inputs, seed=i):
            assert_close(products(linear, x, read), linear, x, read)
        assert torch.equal(products(linear, x, 0), torch.zeros(3, num_outputs))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_equals_the_definition_on_every_instruction_set(shape: tuple[int, int], unit: int) -> None:
    for bits, form in zip(CODE_BITS, ("zeros", "two levels", "offsets"), strict=True):
        linear, x = module(*shape, bits, form=form, unit=unit), draw(2, shape[0], seed=3)
        for read in choices(2, shape[0]):
            y, last = products(linear, x, read), slice(1, 2)
            assert_close(y, linear, x, read)
            assert torch.equal(products(linear, x[last], of_rows(read, last)), y[last])


@pytest.mark.parametrize("unit", [1, 8])
def test_bits_said_channel_by_channel_and_row_by_row_are_those_said_once(unit: int) -> None:
    for bits in CODE_BITS:
        linear, x = module(130, 300, bits, unit=unit), draw(3, 130)
        for value in (0, *WEIGHT_BITS):
            wanted = products(linear, x, value)
            for shape in (x.shape, x.shape[:1]):
                assert torch.equal(products(linear, x, torch.full(shape, value, dtype=torch.uint8)), wanted)


def test_more_bits_than_codes_have_are_all_of_them() -> None:
    for bits in CODE_BITS:
        linear, x, each = module(70, 100, bits), draw(3, 70), draw_bits(3, 70)
        for more in (value for value in WEIGHT_BITS if value > bits):
            assert torch.equal(products(linear, x, more), products(linear, x, bits))
        assert torch.equal(products(linear, x, each), products(linear, x, each.clamp(max=bits)))


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_the_largest_codes_and_activations_saturate_nothing(bits: int, unit: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for num_inputs in (16, 100, 4096, 16384):
        signs = torch.ones(4, num_inputs)
        signs[1], signs[2, 1::2] = -1, -1
        signs[3] = torch.randint(0, 2, (num_inputs,), generator=generator) * 2 - 1
        x, codes = 127 * signs, torch.full((3, num_inputs), 2**bits - 1, dtype=torch.uint8)
        linear, sums = plain(codes, bits, unit=unit), x.long().sum(1)
        for read in (8, 6, 4, 2):
            cell = 2 ** max(bits - read, 0)
            twice = sums * (2 * (2**bits - cell) + cell - 1)  # the middle of the uppermost cell
            wanted = (twice.double() / 2)[:, None].expand(4, 3)
            y = products(linear, x, read)
            if num_inputs == 16:
                assert torch.equal(y.double(), wanted)
            assert bool(((y - wanted).abs() <= tolerances.PRODUCT * 127 * 2**bits * num_inputs).all())
        each = draw_bits(4, num_inputs)
        assert_close(products(linear, x, each), linear, x, each)


@pytest.mark.parametrize("unit", [1, 4, 32])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_rows_alone_are_what_they_are_among_others(bits: int, unit: int) -> None:
    linear, x = module(100, 200, bits, unit=unit, form="zeros"), draw(530, 100)
    for isa in INSTRUCTION_SETS:
        few = isa == "portable"  # slow
        for read in (6,) if few else (8, draw_bits(530), draw_bits(530, 100)):
            with using(isa):
                whole = product(linear, x, read)
                for count in (*range(1, 10), 16, 17, 40, *([] if few else [513])):
                    some = slice(13, 13 + count)
                    assert torch.equal(product(linear, x[some], of_rows(read, some)), whole[some])
    assert_close(products(linear, x[:20], 6), linear, x[:20], 6)


@ISAS
@pytest.mark.parametrize(("num_inputs", "num_outputs", "unit"), [(1, 1, 1), (70, 200, 4), (130, 700, 1)])
def test_any_number_of_threads_gives_the_same_bits(isa: str, num_inputs: int, num_outputs: int, unit: int) -> None:
    linear = module(num_inputs, num_outputs, unit=unit)
    with using(isa):
        for rows in (1, 5, 18):
            x, bits = draw(rows, num_inputs, seed=3), draw_bits(rows, num_inputs, seed=5)
            alone = product(linear, x, bits)
            for count in (2, 3, 7, 33):
                with threads(count):
                    assert torch.equal(product(linear, x, bits), alone)


@ISAS
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_every_output_is_written_and_nothing_else(isa: str, rows: int) -> None:
    for num_outputs, count in pairs([1, 5, 64, 200, 256, 513], [1, 3]):
        linear, x, bits = module(70, num_outputs), draw(rows, 70), draw_bits(rows, 70)
        room = torch.full((rows + 2, num_outputs), float("nan"))
        addresses = x.data_ptr(), room[1:].data_ptr(), rows, bits.data_ptr(), True
        with using(isa):
            native.extension().multiply_rows(native_matrix(linear.stored), *addresses, 8, 0, 0, 0.0, count)
        assert_close(room[1:-1], linear, x, bits)
        assert bool(room[0].isnan().all() & room[-1].isnan().all())


@ISAS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_spoils_no_other(isa: str, bad: float) -> None:
    linear = module(70, 100)
    for rows, at in pairs((3, 20), (0, 15, 40, 69)):
        x, bits = draw(rows, 70), draw_bits(rows, 70)
        for read in (8, bits, torch.zeros_like(bits)):  # whether or not it is read
            with using(isa):
                clean = product(linear, x, read)
                spoilt = product(linear, x.index_put((torch.tensor(1), torch.tensor(at)), torch.tensor(bad)), read)
            assert bool(spoilt[1].isnan().all())
            assert torch.equal(spoilt[2:], clean[2:])
            assert torch.equal(spoilt[0], clean[0])


def test_zeros_give_zeros() -> None:
    for form, bits in pairs(FORMS, CODE_BITS):
        linear = module(70, 100, bits, form=form)
        for read in WEIGHT_BITS:
            assert torch.equal(products(linear, torch.zeros(2, 70), read), torch.zeros(2, 100))


@pytest.mark.parametrize("size", [1e-44, 1e-36, 1e-33, 1e-30, 1e-10, 1e10, 1e28])
def test_small_and_large_activations(size: float) -> None:
    x, read = draw(2, 70) * size, draw_bits(2, 70)
    for form in FORMS:
        linear = module(70, 100, form=form)
        assert_close(products(linear, x, 8), linear, x, 8)
        assert_close(products(linear, x, read), linear, x, read)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
def test_small_and_large_weights(size: float) -> None:
    weight, x = draw(100, 70) * size, draw(2, 70)
    weight[:, ::7] = 0.0
    for group_size in GROUP_SIZES:
        linear = quantized(weight, group_size)
        assert_close(products(linear, x, 8), linear, x, 8)


def quantized(weight: Tensor, group_size: int = 32) -> AnyPrecisionLinear:
    """Return a map of weights [out, in], rounded."""
    return AnyPrecisionLinear(quantize(weight, group_size), None)


@pytest.mark.parametrize("unit", [1, 4, 16])
@pytest.mark.parametrize(("bits", "num_outputs"), [(8, 4288), (6, 8320), (4, 9000)])
def test_wide_matrices_of_which_halves_of_groups_and_strips_are_taken(bits: int, num_outputs: int, unit: int) -> None:
    linear, x = module(40, num_outputs, bits, unit=unit), draw(2, 40)
    each = draw_bits(2, 40)
    for read in (8, each):
        y = products(linear, x, read)
        assert_close(y, linear, x, read)
        for row in (slice(0, 1), slice(1, 2)):
            assert torch.equal(products(linear, x[row], of_rows(read, row)), y[row])
    with threads(3):
        assert torch.equal(product(linear, x, each), y)
        many = product(linear, x.repeat(9, 1), each.repeat(9, 1))
    assert torch.equal(many, y.repeat(9, 1))


@pytest.mark.parametrize("unit", [1, 8])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_channels_that_nobody_reads_leave_nothing_of_earlier_products(rows: int, unit: int) -> None:
    """Where all of a group is left out, sums begin with zeros, not with what the last product left there."""
    linear, x = module(700, 100, unit=unit), draw(rows, 700)
    bits = torch.full(x.shape, 8, dtype=torch.uint8)
    bits[:, :64] = 0
    bits[:, 192:352] = 0  # a whole part of groups, and of the next
    for _ in range(2):
        products(linear, 100.0 * x, 8)
        assert_close(products(linear, x, bits), linear, x, bits)
    assert torch.equal(products(linear, x, torch.zeros_like(bits)), torch.zeros(rows, 100))


@pytest.mark.parametrize("unit", UNITS)
def test_few_channels_read_of_each_group(unit: int) -> None:
    linear = module(129, 200, form="two levels", unit=unit)
    for channels in (
        (0,),
        (128,),
        (3, 4),
        (15, 16),
        (31, 32, 33),
        (0, 5, 10, 15, 16, 21, 26, 31),
        tuple(range(0, 129, 2)),
    ):
        x, bits = draw(3, 129), torch.zeros(3, 129, dtype=torch.uint8)
        bits[0, list(channels)] = 8
        bits[1:, list(channels)] = draw_bits(2, len(channels))
        y = products(linear, x, bits)
        assert_close(y, linear, x, bits)
        assert torch.equal(products(linear, x[:1], bits[:1])[0], y[0])


@pytest.mark.parametrize("bits", CODE_BITS)
def test_activations_in_eight_bits_cost_half_a_percent(bits: int) -> None:
    """Against activations as they are."""
    linear, x = quantized(draw(300, 700)), draw(4, 700)
    weight, _ = weights(linear, bits)
    wanted, y = x.double() @ weight.T, products(linear, x, bits)
    assert float((y - wanted).square().mean().sqrt()) < tolerances.PRODUCT_RMS * float(wanted.square().mean().sqrt())
    units = torch.nn.functional.pad(x, (0, -700 % 16)).view(4, -1, 16).abs().amax(-1) / 127
    off = units.double().repeat_interleave(16, 1)[:, :700] / 2 @ weight.abs().T  # at most half a unit each
    assert bool(((y - wanted).abs() <= off + tolerances.PRODUCT * (x.double().abs() @ weight.abs().T)).all())


def test_one_large_activation_costs_those_beside_it_alone() -> None:
    linear, x, bits = module(200, 100), draw(2, 200), draw_bits(2, 200)
    x[:, 11] = 1e4
    assert_close(products(linear, x, bits), linear, x, bits)
    bits[:, :16] = 0
    without, _ = expected(linear, x.index_fill(1, torch.arange(16), 0.0), bits)
    assert_close(products(linear, x, bits), linear, x, bits)
    torch.testing.assert_close(products(linear, x, bits).double(), without, atol=1e-3, rtol=1e-5)
