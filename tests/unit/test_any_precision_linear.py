"""Quantized linear maps at every number of bits equal sums written out in float64; what is not read cannot matter."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.ops import native
from quicksilver.weights import AnyPrecisionEmbedding, AnyPrecisionLinear, AnyPrecisionSplit
from quicksilver.weights.codes import GROUP_SIZES, GroupedCodes, Scales
from quicksilver.weights.linear import BUFFERS
from quicksilver.weights.rounding import quantize
from tests import tolerances

SHAPES = ((1, 1, 1), (3, 7, 5), (2, 33, 31), (5, 64, 129), (4, 50, 96), (1, 129, 200))  # rows, in, out


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_out(module: AnyPrecisionLinear, x: Tensor, bits: Tensor) -> Tensor:
    """Return [N, out] float64, one product after the other."""
    weights = {value: module.dequantize(value).double() for value in WEIGHT_BITS}
    y = torch.zeros(x.shape[0], module.num_outputs, dtype=torch.float64)
    if module.bias is not None:
        y += module.bias.double()
    for row in range(x.shape[0]):
        for channel in range(x.shape[1]):
            if (value := int(bits[row, channel])) > 0:
                y[row] += x[row, channel].double() * weights[value][:, channel]
    return y


def quantized(num_inputs: int, num_outputs: int, group_size: int = 32, bias: bool = True) -> AnyPrecisionLinear:
    codes = quantize(draw(num_outputs, num_inputs, seed=1), group_size)
    return AnyPrecisionLinear(codes, draw(num_outputs, seed=2) if bias else None)


@pytest.mark.parametrize(("rows", "num_inputs", "num_outputs"), SHAPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
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
    module.get_buffer("low").fill_(171)
    assert torch.equal(module(x, bits), expected)
    skipped = GroupedCodes(module.codes.codes.clone(), 8, 32, module.codes.scales)
    skipped.codes[:, 1::2] = 171
    assert torch.equal(AnyPrecisionLinear(skipped, module.bias)(x, bits), expected)


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
        assert torch.equal(converted.dequantize(), module.dequantize())


def test_eight_bits_are_close_to_the_matrix_itself() -> None:
    weight, x = draw(96, 64), draw(10, 64, seed=1)
    y = AnyPrecisionLinear(quantize(weight, 32), None)(x)
    assert (y - x @ weight.T).norm() / (x @ weight.T).norm() < 0.006


def test_norms_are_those_of_the_codes_loaded_last() -> None:
    module, other = quantized(20, 40), AnyPrecisionLinear(quantize(draw(40, 20, seed=9) * 3.0, 32), draw(40))
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
    assert torch.equal(embedding(ids), embedding.dequantize()[ids])
    assert embedding.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert (embedding(ids) - table[ids]).abs().max() < 0.02


def of_kind(kind: str, bits: int, group_size: int, shape: tuple[int, int]) -> GroupedCodes:
    """Return random codes in one of the forms that scales have, extremes among them."""
    (num_outputs, num_inputs), generator = shape, torch.Generator().manual_seed(3)
    groups, blocks = -(-num_inputs // group_size), -(-num_inputs // 256)

    def small(limit: int, width: int) -> Tensor:
        return torch.randint(0, limit, (num_outputs, width), generator=generator).to(torch.uint8)

    def halves(width: int) -> Tensor:
        return (torch.rand(num_outputs, width, generator=generator) * 0.1).half()

    scales = {
        "half, one zero": lambda: Scales(halves(groups), zero=2 ** (bits - 1)),
        "half, zeros": lambda: Scales(halves(groups), zero=small(2**bits, groups), factor=0.25),
        "half, offsets": lambda: Scales(halves(groups), offsets=halves(groups)),
        "two levels, offsets": lambda: Scales(
            small(64, groups), None, small(64, groups), halves(blocks), halves(blocks), factor=0.5
        ),
        "two levels, zeros": lambda: Scales(small(256, groups), small(2**bits, groups), block_steps=halves(blocks)),
        "signed, one zero": lambda: Scales(
            (small(255, groups).int() - 127).to(torch.int8), 2 ** (bits - 1), block_steps=halves(blocks)
        ),
    }
    return GroupedCodes(small(2**bits, num_inputs), bits, group_size, scales[kind]())


KINDS = (
    "half, one zero",
    "half, zeros",
    "half, offsets",
    "two levels, offsets",
    "two levels, zeros",
    "signed, one zero",
)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_every_kind_come_back_bit_for_bit(kind: str, bits: int) -> None:
    for group_size, shape in ((16, (70, 300)), (32, (3, 33)), (128, (130, 512))):
        codes = of_kind(kind, bits, group_size, shape)
        for unit in (None, 8):
            module = AnyPrecisionLinear(codes, None, unit)
            for made in (module, AnyPrecisionLinear.of_stored(dict(module.named_buffers()), None)):
                assert torch.equal(made.codes.codes, codes.codes)
                assert torch.equal(made.dequantize(), codes.dequantize())
                assert made.codes.scales.factor == codes.scales.factor
                rows = torch.tensor([0, shape[0] - 1, 1])
                assert torch.equal(made.rows_of(rows), codes.dequantize()[rows])


@pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_read_every_kind_of_scales(kind: str) -> None:
    """Whatever power of two they are kept without; but for activations rounded to 8 bits."""
    for bits in (4, 6, 8):
        codes = of_kind(kind, bits, 32, (70, 300))
        for factor in (1.0, 2.0**-23):
            made = dataclasses.replace(codes.scales, factor=factor)
            if made.offsets is not None:  # which are kept with it
                made = dataclasses.replace(made, factor=codes.scales.factor)
            module = AnyPrecisionLinear(dataclasses.replace(codes, scales=made), None)
            x, expected = draw(4, 300), module(draw(4, 300))
            assert (module(x, kernels="native") - expected).norm() < 0.02 * expected.norm()


def test_a_shared_table_is_one_wherever_it_goes() -> None:
    embedding = AnyPrecisionEmbedding(quantize(draw(70, 20), 32), torch.float32)
    head = AnyPrecisionLinear.of_stored(dict(embedding.named_buffers()), None)
    embedding.share(head)
    both = torch.nn.ModuleList([embedding, head])
    for moved in (both, copy.deepcopy(both), copy.deepcopy(both).to("meta"), copy.deepcopy(both).double()):
        table, other = moved
        assert all(table._buffers[name] is other._buffers[name] for name in BUFFERS)
    assert torch.equal(head.dequantize(), embedding.dequantize())
