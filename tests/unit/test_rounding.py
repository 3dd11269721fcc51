"""Codes that are chosen for a matrix: the nearest ones, or ones whose errors make up for one another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quicksilver.errors import ModelError
from quicksilver.weights import AnyPrecisionLinear
from quicksilver.weights.codes import GROUP_SIZES, GroupedCodes, check_group_size
from quicksilver.weights.rounding import outline_of, quantize, walk_order

SHAPES = ((1, 1), (5, 3), (31, 7), (257, 256), (3, 1000), (130, 391))  # out, in
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: w,
    "transposed": lambda w: w.T.contiguous().T,
    "one-sided": lambda w: w.abs() + 1.0,
    "other side": lambda w: -w.abs() - 1.0,
    "far apart": lambda w: w * torch.logspace(-6, 3, len(w))[:, None],
    "heavy tails": lambda w: w**5 * 1e4,
    "constant": lambda w: torch.full_like(w, 0.3),
    "tiny": lambda w: w * 1e-6,
    "huge": lambda w: w * 1e30,
    "zero": torch.zeros_like,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales_at_inputs(codes: GroupedCodes) -> tuple[Tensor, Tensor]:
    """Return scale and offset of every weight, [out, in] each."""
    return tuple(
        t.repeat_interleave(codes.group_size, 1)[:, : codes.num_inputs] for t in codes.scales.expand(codes.group_size)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_other_code_is_nearer(kind: str, group_size: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = KINDS[kind](draw(*shape, seed=sum(shape)) * 0.05).to(dtype)
        codes = quantize(weight, group_size)
        scale, offset = scales_at_inputs(codes)
        error = (codes.dequantize() - weight.float()).abs()
        for step in (-1, 1):
            other = (codes.codes.int() + step).clamp(0, 255) * scale - offset
            slack = 1e-5 * scale * 255
            assert (error <= (other - weight.float()).abs() + slack).all(), shape


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_8_bits_reach_every_weight(kind: str, group_size: int) -> None:
    """None is further off than a step and a half, which is of its group's range a 160th at most."""
    for shape in SHAPES:
        weight = KINDS[kind](draw(*shape, seed=sum(shape)) * 0.05)
        codes = quantize(weight, group_size)
        scale, _ = scales_at_inputs(codes)
        assert ((codes.dequantize() - weight).abs() <= 1.5 * scale + 1e-30).all(), shape


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 0.05, 1.0, 30.0, 1e4, 1e30])
def test_steps_are_as_precise_whatever_the_size_of_weights(size: float) -> None:
    """Half-precision numbers below 6e-5 have fewer digits."""
    weight = draw(64, 512)
    codes = quantize(weight * size, 32)
    halves = codes.scales.block_steps
    assert halves is not None
    assert (halves >= 2**-14).all()
    error = (codes.dequantize() / size - weight).norm() / weight.norm()
    assert error < 0.0051


def test_matrices_of_usual_sizes_can_be_joined() -> None:
    assert len({quantize(draw(8, 64) * size, 32).scales.factor for size in (1e-3, 0.02, 0.3, 5.0)}) == 1


def test_a_small_group_beside_a_large_one_is_no_zero() -> None:
    weight = draw(4, 256)
    weight[:, 32:64] *= 1e-3
    told = quantize(weight, 32).dequantize()
    assert ((told - weight)[:, 32:64].norm() / weight[:, 32:64].norm()) < 0.03


def test_zero_is_a_level_even_where_all_weights_are_on_one_side() -> None:
    for weight in (draw(20, 100), draw(20, 100).abs() + 1.0, -draw(20, 100).abs() - 1.0, torch.zeros(20, 100)):
        weight[:, ::7] = 0.0
        assert (quantize(weight, 32).dequantize()[:, ::7] == 0).all()


@pytest.mark.parametrize("shape", [(130, 391), (64, 32), (3, 40)])
def test_the_4_bit_version_is_the_leading_nibble_read_as_the_middle_of_its_cell(shape: tuple[int, int]) -> None:
    codes = quantize(draw(*shape), 32)
    scale, offset = scales_at_inputs(codes)
    module = AnyPrecisionLinear(codes, None)
    zero = (offset / scale).round()
    assert torch.equal(module.dequantize(4), ((codes.codes >> 4).float() * 16 + 7.5 - zero) * scale)
    assert torch.equal(module.codes.codes, codes.codes)
    assert torch.equal(module.dequantize(8), codes.dequantize())


def test_levels_of_4_bits_are_better_than_those_from_end_to_end() -> None:
    weight = draw(200, 512)
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low).flatten(1)
    told = AnyPrecisionLinear(quantize(weight, 32), None).dequantize(4)
    assert (told - weight).square().sum() < 0.99 * (plain - weight).square().sum()


def test_compensation_helps_four_bits_and_spares_eight() -> None:
    """On inputs that are correlated, as a model's are, the outputs' error falls; at 8 bits it stays small."""
    mix, weight = draw(96, 96, seed=6) + 2.0, draw(64, 96, seed=7)
    x = draw(500, 96, seed=8) @ mix
    plain, compensated = quantize(weight, 32), quantize(weight, 32, hessian=x.T @ x)

    def error(codes: GroupedCodes, bits: int) -> float:
        told = AnyPrecisionLinear(codes, None).dequantize(bits)
        return float((x @ (told - weight).T).norm() / (x @ weight.T).norm())

    assert error(compensated, 4) < 0.8 * error(plain, 4)
    assert error(compensated, 8) < 0.2 * error(compensated, 4)


@pytest.mark.parametrize("shape", [(31, 7), (70, 257), (5, 391)])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_compensated_codes_stay_near_their_weights(shape: tuple[int, int], group_size: int) -> None:
    weight, x = draw(*shape), draw(2 * shape[1], shape[1], seed=1)
    codes = quantize(weight, group_size, x.T @ x)
    scale, offset = scales_at_inputs(codes)
    own = (weight + offset) / scale
    assert ((codes.codes.float() - own).abs() < 18).all()  # a cell, and the reach into the next


def test_inputs_with_the_largest_moments_are_rounded_first() -> None:
    """The one of the largest inputs keeps its nearest cell."""
    x, weight = draw(500, 32, seed=8) @ (draw(32, 32, seed=6) + 2.0), draw(64, 32, seed=7)
    x[:, 17] *= 5.0
    hessian = x.T @ x
    order, _ = walk_order(hessian)
    assert order.tolist() == sorted(range(32), key=lambda channel: -float(hessian[channel, channel]))
    assert order[0] == 17
    codes = quantize(weight, 32, hessian)
    scale, offset = scales_at_inputs(codes)
    nearest = ((weight + offset) / scale).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(codes.codes[:, 17] >> 4, nearest[:, 17] >> 4)
    assert not torch.equal(codes.codes >> 4, nearest >> 4)


def test_outputs_do_not_depend_on_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw(300, 64), draw(100, 64, seed=1)
    whole = quantize(weight, 32, x.T @ x)
    monkeypatch.setattr("quicksilver.weights.rounding._WALK_OUTPUTS", 7)
    monkeypatch.setattr("quicksilver.weights.rounding._TILE_OUTPUTS", 64)
    assert torch.equal(quantize(weight, 32, x.T @ x).codes, whole.codes)
    assert torch.equal(quantize(weight, 32).codes, quantize(weight.clone(), 32).codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(shape: tuple[int, int], value: float) -> None:
    for place in (0, shape[0] * shape[1] // 2, -1):
        weight = draw(*shape)
        weight.view(-1)[place] = value
        with pytest.raises(ModelError, match="NaN or infinite"):
            quantize(weight, 32)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ModelError, match="not positive definite"):
        quantize(draw(32, 8), 32, hessian=-torch.eye(8))
    with pytest.raises(ModelError, match="range of float32"):
        quantize(torch.tensor([[3e38, -3e38, 0.0]]), 32)
    with pytest.raises(ModelError, match="group_size must be one of 16, 32, 64, 128, got 48"):
        quantize(draw(2, 96), 48)
    assert torch.isfinite(quantize(torch.tensor([[1.5e38, -1.5e38, 0.0]]), 32).dequantize()).all()


@pytest.mark.parametrize("group_size", [32.0, True, "32", None])
def test_a_group_size_is_a_whole_number(group_size: object) -> None:
    with pytest.raises(ModelError, match="group_size must be one of 16, 32, 64, 128"):
        check_group_size(group_size)


def test_an_outline_has_the_shapes_of_what_is_made() -> None:
    weight = draw(70, 300)
    made, outline = (AnyPrecisionLinear(each, None) for each in (quantize(weight, 64), outline_of(weight, 64)))
    assert {n: (t.shape, t.dtype) for n, t in made.named_buffers()} == {
        n: (t.shape, t.dtype) for n, t in outline.named_buffers()
    }
