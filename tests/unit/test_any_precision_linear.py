"""Quantized linear maps at every number of bits equal sums written out in float64; what is not read cannot matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.errors import ModelError
from quicksilver.quant import AnyPrecisionEmbedding, AnyPrecisionLinear, AnyPrecisionSplit
from quicksilver.quant.rounding import fit_tables, quantize, walk_order
from tests import tolerances

SHAPES = ((1, 1, 1), (3, 7, 5), (2, 33, 31), (5, 64, 129), (4, 50, 96), (1, 129, 200))  # rows, in, out


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_out(module: AnyPrecisionLinear, x: Tensor, bits: Tensor) -> Tensor:
    """Return [N, out] float64, one product after the other."""
    weights = {value: module.codes.dequantize(value).double() for value in WEIGHT_BITS}
    y = torch.zeros(x.shape[0], module.num_outputs, dtype=torch.float64)
    if module.bias is not None:
        y += module.bias.double()
    for row in range(x.shape[0]):
        for channel in range(x.shape[1]):
            if (value := int(bits[row, channel])) > 0:
                y[row] += x[row, channel].double() * weights[value][channel]
    return y


def quantized(num_inputs: int, num_outputs: int, group_size: int = 32, bias: bool = True) -> AnyPrecisionLinear:
    codes = quantize(draw(num_inputs, num_outputs, seed=1), group_size)
    return AnyPrecisionLinear(codes, draw(num_outputs, seed=2) if bias else None)


@pytest.mark.parametrize(("rows", "num_inputs", "num_outputs"), SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_of_giving_widths_equals_the_oracle(
    rows: int, num_inputs: int, num_outputs: int, group_size: int, bias: bool
) -> None:
    module, x = quantized(num_inputs, num_outputs, group_size, bias), draw(rows, num_inputs, seed=3)
    by_channel = 2 * torch.randint(0, 5, (rows, num_inputs), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    by_token = by_channel[:, 0]
    close = {"atol": tolerances.LOGITS[torch.float32], "rtol": 0}
    torch.testing.assert_close(module(x, by_channel).double(), written_out(module, x, by_channel), **close)
    expected = written_out(module, x, by_token[:, None].expand_as(by_channel))
    torch.testing.assert_close(module(x, by_token).double(), expected, **close)
    for bits in (0, *WEIGHT_BITS):
        expected = written_out(module, x, torch.full_like(by_channel, bits))
        torch.testing.assert_close(module(x, bits).double(), expected, **close)
    assert torch.equal(module(x), module(x, 8))


def test_what_is_skipped_cannot_matter() -> None:
    module, x = quantized(20, 40), draw(3, 20)
    bits = 2 * torch.randint(0, 5, (3, 20), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    expected = module(x, bits)
    poisoned = torch.where(bits == 0, float("nan"), x)
    assert torch.equal(module(poisoned, bits), expected)


def test_planes_that_are_not_read_cannot_matter() -> None:
    module, x = quantized(20, 40), draw(3, 20)
    bits = torch.tensor([2, 0], dtype=torch.uint8).repeat(3, 10)
    expected = module(x, bits)
    for buffer in module.buffers():
        if buffer.dtype == torch.uint8:
            buffer[1::2] = 171  # the channels that are skipped
    for plane in module.codes.planes[1:]:
        plane.fill_(171)
    assert torch.equal(module(x, bits), expected)


def test_tokens_that_share_no_width_share_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product for each number of bits, over that bits's rows alone."""
    module, x, products = quantized(20, 40), draw(6, 20), []
    matmul = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: products.append((*a.shape, b.shape[1])) or matmul(a, b))
    module(x, torch.tensor([8, 4, 4, 2, 0, 8], dtype=torch.uint8))
    assert sorted(products) == [(1, 20, 40), (2, 20, 40), (2, 20, 40)]


def test_leading_dimensions_and_dtypes_are_kept() -> None:
    module, x = quantized(20, 40), draw(2, 3, 20)
    assert module(x).shape == (2, 3, 40)
    for dtype in (torch.float64, torch.bfloat16):
        converted = quantized(20, 40).to(dtype)
        assert converted(x.to(dtype)).dtype == dtype
        torch.testing.assert_close(converted.codes.dequantize(), module.codes.dequantize(), atol=0, rtol=0)


def test_eight_bits_are_close_to_the_matrix_itself() -> None:
    weight, x = draw(64, 96), draw(10, 64, seed=1)
    y = AnyPrecisionLinear(quantize(weight, 32), None)(x)
    assert (y - x @ weight).norm() / (x @ weight).norm() < 0.006


def test_norms_are_those_of_the_codes_loaded_last() -> None:
    module, other = quantized(20, 40), AnyPrecisionLinear(quantize(draw(20, 40, seed=9) * 3.0, 32), draw(40))
    before = module.channel_norms
    for assign in (False, True):
        module.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(module.channel_norms, other.channel_norms)
        assert not torch.equal(module.channel_norms, before)
        module = quantized(20, 40)
        assert torch.equal(module.channel_norms, before)


def test_parts_and_embeddings() -> None:
    parts, x = [quantized(20, 40), quantized(20, 24, bias=False)], draw(3, 20)
    assert torch.equal(AnyPrecisionSplit(parts)(x), torch.cat([part(x) for part in parts], dim=-1))
    table = draw(11, 20)
    embedding = AnyPrecisionEmbedding(quantize(table, 32), torch.float32)
    ids = torch.tensor([[3, 3], [0, 10]])
    assert torch.equal(embedding(ids), embedding.codes.dequantize()[ids])
    assert embedding.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert (embedding(ids) - table[ids]).abs().max() < 0.02


def test_compensation_helps_four_bits_and_spares_eight() -> None:
    """On inputs that are correlated, as a model's are, the outputs' error falls; at 8 bits it stays small."""
    mix, weight = draw(96, 96, seed=6) + 2.0, draw(96, 64, seed=7)
    x = draw(500, 96, seed=8) @ mix
    plain, compensated = quantize(weight, 32), quantize(weight, 32, hessian=x.T @ x)

    def error(codes, bits: int) -> float:
        return float((x @ (codes.dequantize(bits) - weight)).norm() / (x @ weight).norm())

    assert error(compensated, 4) < 0.8 * error(plain, 4)
    assert error(compensated, 8) < 0.2 * error(compensated, 4)
    within = (compensated.codes().float() - plain.codes().float()).abs().max()
    assert 1 < within <= 5  # steps of 8 bits: out of its cell, and what the second walk makes up for


def test_channels_with_the_largest_inputs_are_rounded_first() -> None:
    """So their order in the matrix is of no account, and the channel of the largest inputs keeps its nearest level."""
    x, weight = draw(500, 48, seed=8) @ (draw(48, 48, seed=6) + 2.0), draw(48, 64, seed=7)
    x[:, 17] *= 5.0
    hessian, shuffled = x.T @ x, torch.randperm(48, generator=torch.Generator().manual_seed(9))
    order, _ = walk_order(hessian)
    assert order.tolist() == sorted(range(48), key=lambda channel: -float(hessian[channel, channel]))
    assert order[0] == 17
    codes = quantize(weight, 32, hessian).codes()
    assert torch.equal(codes[17] >> 4, quantize(weight, 32).codes()[17] >> 4)
    assert not torch.equal(codes >> 4, quantize(weight, 32).codes() >> 4)
    again = quantize(weight[shuffled], 32, hessian[shuffled][:, shuffled]).codes()
    assert torch.equal(again, codes[shuffled])


def test_a_hessian_that_cannot_be_factored_is_refused() -> None:
    with pytest.raises(ModelError, match="not positive definite"):
        quantize(draw(8, 32), 32, hessian=-torch.eye(8))


def test_levels_of_narrow_prefixes_are_the_best_whole_codes() -> None:
    weight = draw(40, 96)
    codes = quantize(weight, 32, refit=False)
    for bits in (4, 2):
        table = fit_tables(weight, codes.codes(), codes.grid)[bits]
        fitted = quantize(weight, 32)
        assert torch.equal(fitted.tables[bits], table)
        assert torch.equal(table, table.round().clamp(0, 255))
        best = float((fitted.dequantize(bits) - weight).square().sum())
        assert best <= float((codes.dequantize(bits) - weight).square().sum())
        for prefix in range(2**bits):
            for step in (-1.0, 1.0):
                moved = table.clone()
                moved[prefix] += step
                worse = type(fitted)(fitted.planes, fitted.grid, fitted.num_outputs, {bits: moved})
                assert float((worse.dequantize(bits) - weight).square().sum()) >= best
