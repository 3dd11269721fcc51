"""Any-precision codes: exact packing, narrower versions that are prefixes, levels that cover the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.errors import ModelError
from quicksilver.quant.codes import AnyPrecisionCodes, QuantGrid, centres, check_group_size
from quicksilver.quant.planes import join, run_bytes, split


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_packing_is_exact_and_widths_are_prefixes(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    planes = split(codes)
    assert torch.equal(join(planes, columns), codes)
    for bits in WEIGHT_BITS:
        assert torch.equal(join(planes, columns, bits), codes >> (8 - bits))
    assert [plane.shape for plane in planes] == [(rows, -(-columns // 4))] * 4


def test_reading_a_width_touches_only_its_planes() -> None:
    planes = split(torch.arange(256, dtype=torch.uint8).view(4, 64))
    gone = torch.empty(0)
    assert torch.equal(join((planes[0], gone, gone, gone), 64, 2), join(planes, 64, 2))
    assert torch.equal(join((*planes[:2], gone, gone), 64, 4), join(planes, 64, 4))
    for bits, bytes_read in ((0, 0), (2, 16), (4, 32), (6, 48), (8, 64)):
        assert run_bytes(64, bits) == bytes_read
    for bits in (9, 7, 3, 0):
        with pytest.raises(ValueError, match=f"2, 4, 6, 8 bits, not {bits}"):
            join(planes, 64, bits)


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 150),
    st.sampled_from([32, 64, 128]),
    st.floats(1e-6, 1e4),
    st.integers(0, 99),
)
def test_every_weight_is_within_half_a_step(rows: int, columns: int, group: int, size: float, seed: int) -> None:
    weight = matrix(rows, columns, seed) * size
    grid = QuantGrid.fit(weight, group)
    assert grid.scales.shape == (rows, -(-columns // group))
    codes = AnyPrecisionCodes.pack(grid.nearest(weight), grid)
    step = grid.spread(grid.scales, columns)
    for bits, steps in ((8, 1.0), (4, 8.5), (2, 32.5)):  # half a cell, and the rounding of codes and of zero
        assert ((codes.dequantize(bits) - weight).abs() <= step * steps * 1.001).all(), bits


def test_scales_are_little_above_what_a_group_needs() -> None:
    weight = matrix(50, 640) * torch.logspace(-2, 0, 50)[:, None]
    grid = QuantGrid.fit(weight, 64)
    needed = torch.stack([(part.amax(1) - part.amin(1)) / 255 for part in weight.split(64, 1)], 1)
    ratio = grid.scales / needed
    assert (ratio > 0.9999).all()
    assert (ratio < 1.0443).all()


def test_zero_is_a_level_even_where_all_weights_are_on_one_side() -> None:
    weight = torch.stack((torch.linspace(1.0, 2.0, 64), torch.linspace(-2.0, -1.0, 64), torch.zeros(64)))
    grid = QuantGrid.fit(weight, 32)
    codes = AnyPrecisionCodes.pack(grid.nearest(weight), grid)
    assert ((codes.dequantize() - weight).abs() < 0.0043).all()
    assert torch.equal(grid.nearest(torch.zeros(3, 64)), grid.spread(grid.zeros, 64))


def test_a_prefix_stands_for_the_middle_of_its_cell() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for bits in (4, 2):
        error = centres(bits)[(codes >> (8 - bits)).int()] - codes
        assert abs(error.mean()) < 1e-6
        assert error.abs().max() == 2 ** (8 - bits) / 2 - 0.5
    assert torch.equal(centres(8), codes.float())


def test_other_group_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match="group_size must be one of 32, 64, 128, got 48"):
        QuantGrid.fit(matrix(2, 96), 48)


@pytest.mark.parametrize("group_size", [32.0, True, "32", None])
def test_a_group_size_is_a_whole_number(group_size: object) -> None:
    with pytest.raises(ModelError, match="group_size must be one of 32, 64, 128"):
        check_group_size(group_size)


@pytest.mark.parametrize("columns", [1, 40, 300])
def test_channels_decoded_alone_are_the_same_to_the_last_bit(columns: int) -> None:
    weight = matrix(67, columns) * torch.logspace(-4, 0, 67)[:, None]
    grid = QuantGrid.fit(weight, 32)
    codes = AnyPrecisionCodes.pack(grid.nearest(weight), grid)
    for bits in (8, 4):
        whole = codes.dequantize(bits)
        for count in range(1, 67):
            channels = torch.arange(67)[-count:]
            assert torch.equal(codes.select(channels, bits).dequantize(bits), whole[channels])


def test_weights_whose_levels_would_be_infinite_are_refused() -> None:
    weight = torch.tensor([[3e38, -3e38, 0.0]])
    with pytest.raises(ModelError, match="range of float32"):
        QuantGrid.fit(weight, 32)
    grid = QuantGrid.fit(weight / 2, 32)
    assert torch.isfinite(AnyPrecisionCodes.pack(grid.nearest(weight / 2), grid).dequantize()).all()
