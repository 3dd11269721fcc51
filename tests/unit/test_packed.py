"""Packed GPTQ and AWQ maps: what is taken over is what the tools' formulas say, bit for bit, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.weights.codes import GroupedCodes
from quicksilver.weights.packed import unpack, zeros_in_doubt
from quicksilver.weights.packed_settings import PackedSettings
from tests.packing import DrawnMap, draw

FILE = "there/config.json"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
FROM_GPTQMODEL = {"meta": {"quantizer": ["optimum:1.2", "gptqmodel:2.0.0"]}}
SHAPES = ((64, 64), (32, 96), (96, 32), (16, 48))


def settings(base: dict[str, Any] = GPTQ, **changes: Any) -> PackedSettings:
    return PackedSettings.read({FILE: {**base, **changes}})


def taken(parts: dict[str, Tensor], given: PackedSettings, shape: tuple[int, int]) -> GroupedCodes:
    return unpack(parts, given, shape, lambda part: f"file: tensor 'map.{part}'")


def refusal(parts: dict[str, Tensor], given: PackedSettings, shape: tuple[int, int]) -> str:
    with pytest.raises(ModelError) as refused:
        taken(parts, given, shape)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def word(value: int) -> Tensor:
    return torch.tensor([[value - 2**32 if value >= 2**31 else value]], dtype=torch.int32)


def zeros_of(qzeros: int, given: PackedSettings) -> list[int]:
    """Return the eight zeros of a word, by taking over a map of 32 inputs and 8 outputs whose scales are 1."""
    parts = {"qweight": torch.zeros(4, 8, dtype=torch.int32), "scales": torch.ones(1, 8).half(), "qzeros": word(qzeros)}
    if given.method == "awq":
        parts["qweight"] = torch.zeros(32, 1, dtype=torch.int32)
    return (-taken(parts, given, (8, 32)).dequantize()[:, 0]).int().tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_taken_over_exactly(bits: int, layout: str, symmetric: bool, shape: tuple[int, int]) -> None:
    made = draw(*shape, bits, symmetric=symmetric)
    given = settings(bits=bits, checkpoint_format=layout, sym=symmetric)
    codes = taken(made.gptq(layout), given, shape)
    assert torch.equal(codes.dequantize(), made.weight())
    assert codes.group_size == 32
    assert codes.bits == max(bits, 4)
    assert torch.equal(codes.codes >> codes.bits - bits, torch.from_numpy(made.codes.T).to(torch.uint8))
    assert isinstance(codes.scales.zero, int) == symmetric


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("version", [{}, {"version": "gemm"}, {"version": "GEMM"}, {"format": "gemm"}], ids=str)
def test_awq_is_taken_over_exactly(version: dict[str, str], shape: tuple[int, int]) -> None:
    made = draw(*shape)
    codes = taken(made.awq(), settings(AWQ, **version), shape)
    assert torch.equal(codes.dequantize(), made.weight())
    assert codes.codes.is_contiguous()
    assert isinstance(codes.scales.zero, Tensor)


@pytest.mark.parametrize(
    ("group_size", "num_inputs", "taken_size"),
    [
        *[(16, 64, 16), (32, 64, 32), (64, 128, 64), (128, 256, 128), (128, 192, 128), (64, 96, 64), (128, 32, 128)],
        *[
            (-1, 32, 128),
            (-1, 320, 128),
            (256, 512, 128),
            (256, 320, 128),
            (96, 192, 32),
            (48, 96, 16),
            (10**30, 64, 128),
        ],
    ],
)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_groups_of_any_size_that_ours_divide(method: str, group_size: int, num_inputs: int, taken_size: int) -> None:
    made = draw(16, num_inputs, group_size=group_size)
    parts, given = (made.gptq(), GPTQ) if method == "gptq" else (made.awq(), AWQ)
    codes = taken(parts, settings(given, group_size=group_size), (16, num_inputs))
    assert codes.group_size == taken_size
    assert torch.equal(codes.dequantize(), made.weight())


@pytest.mark.parametrize("group_size", [8, 24, 100])
def test_other_groups_are_refused_by_size(group_size: int) -> None:
    made = draw(16, 128, group_size=group_size)
    with pytest.raises(UnsupportedModelError) as refused:
        taken(made.gptq(), settings(group_size=group_size), (16, 128))
    assert str(refused.value) == f"{FILE}: group_size {group_size} is not supported; multiples of 16 are"


def test_codes_of_three_bits_run_on_across_words() -> None:
    """Ten codes, two bits of the next; its last, ten, one bit of the next; its last two, ten: 32 in three words."""
    codes = [(5 * i + 3) % 8 for i in range(32)]
    words = [0, 0, 0]
    for j in range(10):
        words[0] |= codes[j] << 3 * j
        words[1] |= codes[11 + j] << 3 * j + 1
        words[2] |= codes[22 + j] << 3 * j + 2
    words[0] |= (codes[10] & 3) << 30
    words[1] |= codes[10] >> 2 | (codes[21] & 1) << 31
    words[2] |= codes[21] >> 1
    parts = {"qweight": torch.cat([word(w) for w in words]), "scales": torch.ones(1, 1).half(), "qzeros": word(0)}
    weight = taken(parts, settings(bits=3, checkpoint_format="gptq_v2"), (1, 32)).dequantize()
    assert weight[0].int().tolist() == codes


@pytest.mark.parametrize(
    ("given", "qzeros", "zeros"),
    [
        (settings(), 0x77777777, [8] * 8),
        (settings(checkpoint_format="gptq_v2"), 0x88888888, [8] * 8),
        (settings(), 0xEDCBA980, [1, 9, 10, 11, 12, 13, 14, 15]),
        (settings(), 0xF7777777, [8] * 7 + [0]),
        (settings(checkpoint_format="gptq_v2"), 0xFEDCBA98, [8, 9, 10, 11, 12, 13, 14, 15]),
        (settings(), 0x7777777F, [0] + [8] * 7),  # 1 taken from each field alone
        (settings(**FROM_GPTQMODEL), 0x7777776F, [0] + [8] * 7),  # 1 taken from each, borrowed from the next
        (settings(**FROM_GPTQMODEL), 0x77777777, [8] * 8),
        (settings(**FROM_GPTQMODEL), 0xEEEEEEEF, [0] * 8),
        (settings(**FROM_GPTQMODEL, checkpoint_format="gptq_v2"), 0x7777776F, [15, 6, 7, 7, 7, 7, 7, 7]),
        (settings(meta={"quantizer": "gptqmodel:0.8.9"}), 0x7777777F, [0] + [8] * 7),
        (settings(meta={"quantizer": "gptqmodel:1.0"}), 0x7777776F, [0] + [8] * 7),
        (settings(AWQ), 0x76543210, [0, 4, 1, 5, 2, 6, 3, 7]),
        (settings(AWQ), 0xFFFFFFFF, [15] * 8),
    ],
)
def test_stored_zeros(given: PackedSettings, qzeros: int, zeros: list[int]) -> None:
    assert zeros_of(qzeros, given) == zeros


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_of_0_that_borrowed_from_the_next_are_read_where_the_writer_is_known(bits: int) -> None:
    made = draw(64, 96, bits, seed=1)
    made.zeros[:, ::5] = 0
    parts, given = made.gptq(writer="words"), settings(bits=bits, **FROM_GPTQMODEL)
    assert torch.equal(taken(parts, given, (64, 96)).dequantize(), made.weight())
    assert not zeros_in_doubt(parts["qzeros"], given, 64)


@pytest.mark.parametrize(
    ("writer", "bits"),
    [("fields", 3), *((writer, bits) for writer in ("fields", "words", "smeared") for bits in (2, 4, 8))],
)
def test_zeros_that_may_have_been_0_are_told_where_the_writer_is_not(writer: Any, bits: int) -> None:
    made = draw(32, 32, bits)
    made.zeros[:] = 2
    assert not zeros_in_doubt(made.gptq(writer=writer)["qzeros"], settings(bits=bits), 32)
    made.zeros[0, 2] = 0
    assert zeros_in_doubt(made.gptq(writer=writer)["qzeros"], settings(bits=bits), 32)
    assert not zeros_in_doubt(made.gptq("gptq_v2")["qzeros"], settings(bits=bits, checkpoint_format="gptq_v2"), 32)


@pytest.mark.parametrize("writer", ["fields", "words", "smeared"])
def test_a_zero_of_0_at_the_top_of_a_word_is_never_in_doubt(writer: Any) -> None:
    made = draw(32, 32)
    made.zeros[:] = 8
    made.zeros[0, 7::8] = 0
    parts = made.gptq(writer=writer)
    assert not zeros_in_doubt(parts["qzeros"], settings(), 32)
    for given in (settings(), settings(**FROM_GPTQMODEL)):
        assert torch.equal(taken(parts, given, (32, 32)).dequantize(), made.weight())


def test_fields_that_fill_the_last_word_up_are_never_in_doubt() -> None:
    made = draw(12, 32)
    made.zeros[:] = 8
    parts = made.gptq(writer="words")
    assert not zeros_in_doubt(parts["qzeros"], settings(), 12)
    assert torch.equal(taken(parts, settings(), (12, 32)).dequantize(), made.weight())


def test_awq_words_hold_outputs_in_an_order_of_their_own() -> None:
    """Nibbles from the lowest: outputs 0, 2, 4, 6, 1, 3, 5, 7; zeros likewise, scales as they are."""
    parts = {
        "qweight": word(0x75316420).expand(32, 1).contiguous(),
        "qzeros": word(0),
        "scales": torch.arange(1, 9).half()[None],
    }
    weight = taken(parts, settings(AWQ), (8, 32)).dequantize()
    assert weight[:, 0].tolist() == [output * (output + 1) for output in range(8)]


def test_a_label_of_the_other_method_is_refused() -> None:
    """Sizes are alike in a square map, words are not."""
    made = draw(64, 64)
    assert "tensor 'map.qweight' has shape [8, 64], not [64, 8] as awq" in refusal(made.gptq(), settings(AWQ), (64, 64))
    assert "tensor 'map.qweight' has shape [64, 8], not [8, 64] as gptq" in refusal(made.awq(), settings(), (64, 64))


@pytest.mark.parametrize(("label", "zero"), [("gptq", 9), ("gptq_v2", 7)])
@pytest.mark.parametrize("stated", [{"sym": True}, {"sym": None}], ids=str)
def test_symmetric_codes_whose_zero_is_not_the_middle_are_refused(
    stated: dict[str, Any], label: str, zero: int
) -> None:
    made = draw(32, 64, symmetric=True)
    stored = "gptq_v2" if label == "gptq" else "gptq"
    line = refusal(made.gptq(stored), settings(**stated, checkpoint_format=label), (32, 64))
    assert line.startswith(f"file: tensor 'map.qzeros' gives codes a zero of {zero}, not the 8")
    assert "sym or checkpoint_format" in line
    assert FILE in line


def order(change: Callable[[Tensor], Tensor]) -> DrawnMap:
    made = draw(16, 128)
    made.group_of = change(torch.tensor(made.group_of)).tolist()
    return made


@pytest.mark.parametrize("stated", [{}, {"desc_act": False}, {"desc_act": True}], ids=str)
def test_inputs_whose_groups_are_spread_are_refused(stated: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = order(lambda group_of: group_of[torch.randperm(len(group_of))])
    line = refusal(made.gptq(), settings(**stated), (16, 128))
    assert line.startswith("file: tensor 'map.g_idx' spreads the inputs of a group")
    assert "desc_act" in line


@pytest.mark.parametrize("desc_act", [False, True])
def test_groups_in_another_order_whose_inputs_are_adjacent_are_followed(desc_act: bool) -> None:
    for made in (
        order(lambda group_of: group_of),
        order(lambda group_of: group_of.flip(0)),
        order(lambda group_of: group_of.view(2, 64).roll(1, 0).flatten()),
        order(lambda group_of: group_of.view(8, 16)[[0, 3, 1, 7, 5, 2, 4, 6]].flatten()),
    ):
        codes = taken(made.gptq(), settings(desc_act=desc_act), (16, 128))
        assert torch.equal(codes.dequantize(), made.weight())


def test_without_an_order_groups_are_those_of_adjacent_inputs() -> None:
    made = draw(16, 128)
    parts = made.gptq()
    del parts["g_idx"]
    assert torch.equal(taken(parts, settings(), (16, 128)).dequantize(), made.weight())
    line = refusal(parts, settings(desc_act=True), (16, 128))
    assert line == f"file: tensor 'map.g_idx' is missing; {FILE} says desc_act"


@pytest.mark.parametrize("value", [-1, 4, 2**31 - 1])
def test_an_order_that_names_no_group_is_refused(value: int) -> None:
    made = draw(16, 128)
    made.group_of[5] = value
    assert "'map.g_idx' does not give each of the 4 groups" in refusal(made.gptq(), settings(), (16, 128))


def test_an_order_that_leaves_groups_out_is_refused() -> None:
    made = order(torch.zeros_like)
    assert "'map.g_idx' does not give each of the 4 groups" in refusal(made.gptq(), settings(), (16, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_of_other_floats_are_taken_where_half_precision_holds_them(dtype: torch.dtype) -> None:
    made = draw(16, 64)
    made.scales = (made.scales.view(torch.int16) & -8).view(torch.float16)  # as many digits as bfloat16 has
    made.scales[0, :2] = torch.tensor([-(2.0**-24), 2.0**-14])
    parts = made.gptq()
    parts["scales"] = parts["scales"].to(dtype)
    assert torch.equal(taken(parts, settings(), (16, 64)).dequantize(), made.weight())
    for value in (2.0**-25, 2.0**17, 1.5 * 2.0**-24):
        parts["scales"][1, 3] = value
        line = refusal(parts, settings(), (16, 64))
        assert line.startswith(f"file: tensor 'map.scales' is {str(dtype).removeprefix('torch.')} and holds values")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_that_are_no_numbers_are_refused(dtype: torch.dtype, value: float) -> None:
    parts = draw(16, 64).gptq()
    parts["scales"] = parts["scales"].to(dtype)
    parts["scales"][1, 3] = value
    assert refusal(parts, settings(), (16, 64)) == "file: tensor 'map.scales' holds NaN or infinite values"


SPOILT: dict[str, tuple[str, str, Callable[[Tensor], Tensor | None]]] = {
    "no qweight": ("qweight", "is missing", lambda _: None),
    "no qzeros": ("qzeros", "is missing", lambda _: None),
    "no scales": ("scales", "is missing", lambda _: None),
    "fewer inputs": ("qweight", "has shape [7, 16], not [8, 16]", lambda tensor: tensor[1:]),
    "more inputs": ("qweight", "has shape [16, 16], not [8, 16]", lambda tensor: tensor.repeat(2, 1)),
    "more groups": ("scales", "has shape [4, 16], not [2, 16]", lambda tensor: tensor.repeat(2, 1)),
    "fewer groups": ("qzeros", "has shape [1, 2], not [2, 2]", lambda tensor: tensor[1:]),
    "flat scales": ("scales", "has shape [32], not [2, 16]", lambda tensor: tensor.flatten()),
    "another order's length": ("g_idx", "has shape [63], not [64]", lambda tensor: tensor[1:]),
    "int16": ("qweight", "is int16, not int32", lambda tensor: tensor.short()),
    "int64": ("qzeros", "is int64, not int32", lambda tensor: tensor.long()),
    "whole scales": ("scales", "is int32, not float16 or", lambda tensor: tensor.int()),
    "an order of floats": ("g_idx", "is float32, not int32 or", lambda tensor: tensor.float()),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_tensor_that_does_not_fit_is_named(how: str) -> None:
    part, reason, change = SPOILT[how]
    parts = draw(16, 64).gptq()
    changed = change(parts.pop(part))
    parts |= {} if changed is None else {part: changed}
    assert f"file: tensor 'map.{part}' {reason}" in refusal(parts, settings(), (16, 64))


@pytest.mark.parametrize("changes", [{"bits": 8}, {"bits": 3}, {"bits": 2}, {"group_size": 64}, {"group_size": -1}])
def test_other_bits_and_groups_than_the_settings_say_are_refused(changes: dict[str, int]) -> None:
    line = refusal(draw(16, 64).gptq(), settings(**changes), (16, 64))
    given = {"bits": 4, "group_size": 32, **changes}
    assert f"gptq with {given['bits']} bits and group_size {given['group_size']} ({FILE})" in line
