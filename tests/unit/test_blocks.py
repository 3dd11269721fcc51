"""Codes are chosen block by block, and are those of the whole matrix at once, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quicksilver.errors import ModelError
from quicksilver.quant.codes import centres
from quicksilver.quant.rounding import quantize

SHAPES = ((1, 1), (3, 5), (7, 31), (224, 128), (225, 129), (300, 700), (5, 1000), (450, 391))
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: w,
    "transposed": lambda w: w.T.contiguous().T,
    "one-sided": lambda w: w.abs() + 1.0,
    "far apart": lambda w: w * torch.logspace(-6, 3, len(w))[:, None],
    "heavy tails": lambda w: w**5 * 1e4,
    "few values": lambda w: (w * 40).round(),
    "constant": lambda w: torch.full_like(w, 0.3),
    "zero": torch.zeros_like,
}


def draw(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def defined(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """Return what `docs/quantization.md` says of a matrix [in, out], all of it at once."""
    num_inputs, num_outputs = weight.shape
    parts = weight.float().split(group_size, dim=1)
    low = torch.stack([part.amin(1) for part in parts], 1).clamp(max=0.0)
    high = torch.stack([part.amax(1) for part in parts], 1).clamp(min=0.0)
    needed = (high - low) / 255
    largest = needed.max().clamp(min=torch.finfo(torch.float32).tiny)
    exponents = (torch.log2(largest / needed) * 16).floor().clamp(0, 255)
    factors = torch.tensor([2.0 ** (-exponent / 16) for exponent in range(256)])
    scales = largest * factors[exponents.int()]
    zeros = (-low / scales).round().clamp(0, 255)
    spread = [t.repeat_interleave(group_size, 1)[:, :num_outputs] for t in (scales, zeros)]
    levels = weight.float() / spread[0] + spread[1]
    codes = levels.round().clamp(0, 255).to(torch.uint8)
    found = {"exponents": exponents.to(torch.uint8), "zeros": zeros.to(torch.uint8), "largest": largest, "codes": codes}
    for bits in (4, 2):
        prefixes, squares = (codes >> (8 - bits)).flatten().long(), spread[0].flatten().double().square()
        total, summed = (
            torch.zeros(2**bits, dtype=torch.float64).index_add_(0, prefixes, values)
            for values in (squares, squares * levels.flatten().double())
        )
        level = torch.where(total > 0, summed / total, centres(bits).double())
        found[f"levels of {bits} bits"] = level.round().clamp(0, 255).float()
    padded = torch.nn.functional.pad(codes, (0, -num_outputs % 4)).view(num_inputs, -1, 4).int()
    for i, shift in enumerate((6, 4, 2, 0)):
        two = (padded >> shift) & 3
        found[f"plane {i}"] = (two << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_what_the_whole_matrix_gives(kind: str, group_size: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = KINDS[kind](draw(shape)).to(dtype)
        got = quantize(weight, group_size)
        found = {"exponents": got.grid.exponents, "zeros": got.grid.zeros, "largest": got.grid.largest}
        found |= {"codes": got.codes()} | {f"levels of {bits} bits": table for bits, table in got.tables.items()}
        found |= {f"plane {i}": plane for i, plane in enumerate(got.planes)}
        expected = defined(weight, group_size)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (shape, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(shape: tuple[int, int], value: float) -> None:
    for place in (0, shape[0] * shape[1] // 2, -1):
        weight = draw(shape)
        weight.view(-1)[place] = value
        with pytest.raises(ModelError, match="NaN or infinite"):
            quantize(weight, 32)
