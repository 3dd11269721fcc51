"""The kernels' products at all bits equal their definition within the bound of their rounding, on every set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.ops import native
from quicksilver.ops.any_precision_linear import multiply, prepared
from quicksilver.quant import AnyPrecisionLinear
from quicksilver.quant.rounding import quantize
from tests import tolerances
from tests.ops import any_precision
from tests.ops.any_precision import (
    INSTRUCTION_SETS,
    assert_close,
    draw,
    draw_bits,
    expected,
    module,
    random_codes,
    threads,
    using,
)

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")

SHAPES = ((1, 1), (3, 5), (7, 64), (64, 129), (65, 200), (129, 256), (130, 300), (63, 513))  # in, out
ISAS = pytest.mark.parametrize("isa", INSTRUCTION_SETS)


def product(linear: AnyPrecisionLinear, x: Tensor, bits: int | Tensor) -> Tensor:
    return any_precision.product(x, linear.stored, bits)


@ISAS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_width_equals_the_definition(isa: str, shape: tuple[int, int], group_size: int) -> None:
    linear, x = module(*shape, group_size), draw(3, shape[0], seed=3)
    with using(isa):
        for bits in WEIGHT_BITS:
            assert_close(product(linear, x, bits), linear, x, torch.full(x.shape, bits))
        assert torch.equal(product(linear, x, 0), torch.zeros(3, shape[1]))


@ISAS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", [module, random_codes])
def test_widths_channel_by_channel_equal_the_definition(isa: str, shape: tuple[int, int], make) -> None:
    linear, x, bits = make(*shape), draw(4, shape[0], seed=3), draw_bits(4, shape[0], seed=5)
    with using(isa):
        assert_close(product(linear, x, bits), linear, x, bits)
        for value in (0, *WEIGHT_BITS):  # one number of bits for all, said channel by channel
            each = torch.full_like(bits, value)
            assert torch.equal(product(linear, x, each), product(linear, x, value))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_all_instruction_sets_give_the_same_bits(shape: tuple[int, int], group_size: int) -> None:
    linear, x = random_codes(*shape, group_size), draw(4, shape[0], seed=3)
    for bits in (0, *WEIGHT_BITS, draw_bits(4, shape[0], seed=5)):
        results = []
        for isa in INSTRUCTION_SETS:
            with using(isa):
                results.append(product(linear, x, bits))
        assert all(torch.equal(results[0], each) for each in results)


@ISAS
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (65, 200), (130, 700)], ids=str)
def test_any_number_of_threads_gives_the_product_and_always_the_same(
    isa: str, count: int, shape: tuple[int, int]
) -> None:
    linear, x, bits = module(*shape), draw(5, shape[0], seed=3), draw_bits(5, shape[0], seed=5)
    with using(isa), threads(count):
        y = product(linear, x, bits)
        assert_close(y, linear, x, bits)
        assert all(torch.equal(product(linear, x, bits), y) for _ in range(5))


@ISAS
@pytest.mark.parametrize("num_outputs", [1, 5, 64, 200, 256, 513])
@pytest.mark.parametrize("count", [1, 3])
def test_every_output_is_written_and_nothing_else(isa: str, num_outputs: int, count: int) -> None:
    linear, x, bits = module(70, num_outputs), draw(2, 70), draw_bits(2, 70)
    product(linear, x, 8)
    room = torch.full((4, num_outputs), float("nan"))
    with using(isa):
        matrix = prepared(linear.stored, by_channel=True)
        addresses = x.data_ptr(), room[1:3].data_ptr(), 2, bits.data_ptr(), True
        native.extension().multiply_rows(matrix, *addresses, 8, 0, 0, 0.0, count)
    assert_close(room[1:3], linear, x, bits)
    assert bool(room[0].isnan().all() & room[3].isnan().all())


@ISAS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_spoils_no_other(isa: str, bad: float) -> None:
    linear, x, bits = module(70, 100), draw(3, 70), draw_bits(3, 70)
    with using(isa):
        clean = product(linear, x, bits)
        x[1, 69] = bad
        spoilt = product(linear, x, bits)
    assert bool(spoilt[1].isnan().all())
    assert torch.equal(spoilt[::2], clean[::2])


@ISAS
def test_zeros_give_zeros(isa: str) -> None:
    linear = random_codes(70, 100)
    with using(isa):
        for bits in WEIGHT_BITS:
            assert torch.equal(product(linear, torch.zeros(2, 70), bits), torch.zeros(2, 100))


@ISAS
@pytest.mark.parametrize("size", [1e-44, 1e-36, 1e-33, 1e-30, 1e-10, 1e10, 1e28])
def test_small_and_large_activations(isa: str, size: float) -> None:
    linear, x = module(70, 100, spread=4.0), draw(2, 70) * size
    with using(isa):
        y = product(linear, x, 8)
    wanted = expected(linear, x, torch.full(x.shape, 8))
    below = 70 * 1e-34 * 256 * float(linear.codes.grid.largest)  # coefficients below 1e-34 count as zero
    assert float((y - wanted).abs().max()) <= tolerances.PRODUCT_MAX * float(wanted.abs().max()) + below


@ISAS
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e6, 1e30])
def test_small_and_large_weights(isa: str, size: float) -> None:
    weight, x = draw(70, 100) * size, draw(2, 70)
    weight[::7] = 0.0
    linear = AnyPrecisionLinear(quantize(weight, 32), None)
    with using(isa):
        assert_close(product(linear, x, 8), linear, x, torch.full(x.shape, 8))


@ISAS
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(70, 4500), (70, 8320)])
def test_matrices_of_several_strips(isa: str, num_inputs: int, num_outputs: int) -> None:
    linear, x, bits = module(num_inputs, num_outputs), draw(2, num_inputs), draw_bits(2, num_inputs)
    with using(isa):
        assert_close(product(linear, x, bits), linear, x, bits)
        assert_close(product(linear, x, 8), linear, x, torch.full(x.shape, 8))


@ISAS
def test_a_width_for_each_row_is_that_row_alone_at_the_width(isa: str) -> None:
    linear, x = module(130, 300), draw(40, 130)
    bits = draw_bits(40, seed=5)
    with using(isa):
        alone = [product(linear, x[row : row + 1], int(bits[row])) for row in range(40)]
        assert torch.equal(product(linear, x, bits), torch.cat(alone))


def test_a_matrix_laid_out_for_one_width_is_not_read_by_channel() -> None:
    linear, x, bits = module(130, 300), draw(2, 130), draw_bits(2, 130)
    with pytest.raises(ValueError, match="not laid out"):
        multiply(x, prepared(linear.stored, by_channel=False), bits)


@ISAS
@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_in_practice_products_are_off_by_a_few_parts_in_a_hundred_thousand(isa: str, bits: int) -> None:
    """Far inside the bound, which adds up the worst of every coefficient."""
    linear, x = module(700, 300, spread=0.0), draw(4, 700)
    wanted = expected(linear, x, torch.full(x.shape, bits))
    with using(isa):
        error = product(linear, x, bits) - wanted
    assert float(error.square().mean().sqrt()) < tolerances.PRODUCT_RMS * float(wanted.square().mean().sqrt())


@ISAS
@pytest.mark.parametrize("rows", [1, 40])
def test_channels_that_nobody_reads_leave_nothing_of_earlier_products(isa: str, rows: int) -> None:
    """Where a unit's first block is empty, its sums begin with zeros, not with what the last product left there."""
    linear, x = module(700, 300), draw(rows, 700)
    bits = torch.full(x.shape, 8, dtype=torch.uint8)
    bits[:, :64] = 0
    bits[:, 192:256] = 0  # the first block of the second unit, and of every third
    with using(isa):
        for _ in range(2):
            product(linear, 100.0 * x, 8)
            assert_close(product(linear, x, bits), linear, x, bits)
        nothing = torch.zeros_like(bits)
        assert torch.equal(product(linear, x, nothing), torch.zeros(rows, 300))


@ISAS
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(70, 100), (700, 300), (130, 4500)])
def test_neither_threads_nor_other_rows_change_a_bit(isa: str, num_inputs: int, num_outputs: int) -> None:
    linear, x = module(num_inputs, num_outputs), draw(5, num_inputs)
    bits = draw_bits(5, num_inputs)
    with using(isa):
        products = []
        for count in (1, 2, 3):
            with threads(count):
                products.append(product(linear, x, bits))
                alone = [product(linear, x[i : i + 1], bits[i : i + 1]) for i in range(len(x))]
                assert torch.equal(torch.cat(alone), products[-1])
        assert torch.equal(products[0], products[1])
        assert torch.equal(products[0], products[2])


@ISAS
def test_one_large_activation_costs_the_others_no_more_than_the_bound(isa: str) -> None:
    linear, x, bits = module(200, 100), draw(2, 200), draw_bits(2, 200)
    x[:, 11] = 1e4
    with using(isa):
        assert_close(product(linear, x, bits), linear, x, bits)
