"""The packed words of GPTQ and AWQ maps, taken over as codes in groups: nothing is rounded anew.

GPTQ packs the inputs of an output into words, lowest bits first, AWQ the outputs of an input, in an order of its own.
Both pack the zeros of a group over its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.weights.codes import GROUP_SIZES, GroupedCodes, Scales
from quicksilver.weights.packed_settings import PackedSettings

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Tensors of a packed map; the last one may be missing."""

_DTYPES = {
    "qweight": (torch.int32,),
    "qzeros": (torch.int32,),
    "scales": (torch.float16, torch.bfloat16, torch.float32),
    "g_idx": (torch.int32, torch.int64),
}
_WORD = 32
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # of eight outputs in a word, which nibble each is in
_KEPT_BITS = {2: 4, 3: 4, 4: 4, 8: 8}  # of codes of so many bits, which fill the upper ones

Describe = Callable[[str], str]
"""From one of PARTS to how a message names it, with its file."""


def unpack(
    parts: Mapping[str, Tensor], settings: PackedSettings, shape: Sequence[int], describe: Describe
) -> GroupedCodes:
    """Return the codes of a map that GPTQ or AWQ has packed.

    Args:
        parts: the map's tensors, named as in PARTS.
        settings: the map's own, `PackedSettings.of`.
        shape: [out, in] that the model says.
        describe: how messages name a tensor.

    Raises:
        ModelError: a tensor is missing, has another shape or type than the settings say, or holds NaN or infinity;
            or symmetric codes have another zero than the middle one.
        UnsupportedModelError: inputs are in groups that are not adjacent, or scales are beyond half precision.
    """
    _check_parts(parts, settings, shape, describe)
    num_outputs, num_inputs = shape
    size, group_of = _adjacent_groups(parts.get("g_idx"), settings, num_inputs, describe)
    shift = _KEPT_BITS[settings.bits] - settings.bits
    if settings.method == "gptq":
        codes = _fields(parts["qweight"].T, settings.bits)[:, :num_inputs]
    else:
        codes = _in_order(_fields(parts["qweight"], settings.bits))[:, :num_outputs].T
    zeros = _zeros(parts["qzeros"], settings, num_outputs)  # [groups, out]
    zero = zeros[group_of].T.contiguous() << shift
    if settings.symmetric:
        zero = _middle(zeros, settings, describe) << shift
    steps = _half_precision(parts["scales"], describe)[group_of].T.contiguous()
    scales = Scales(steps, zero=zero, factor=2.0**-shift)
    return GroupedCodes(codes.contiguous() << shift, _KEPT_BITS[settings.bits], size, scales)


def zeros_in_doubt(qzeros: Tensor, settings: PackedSettings, num_outputs: int) -> bool:
    """Whether programs disagree on the zeros of a map.

    GPTQ's first format stores a zero less one, and what became of 0 depends on who wrote it: all bits of that field
    alone, those of all fields above it too, or a borrow from the next one. At the top of a word these are the same.
    """
    if settings.zero_offset == 0 or settings.borrows:
        return False
    fields = _fields(qzeros, settings.bits)[:, :num_outputs]
    if _WORD % settings.bits == 0:
        per_word = _WORD // settings.bits
        fields = fields[:, torch.arange(fields.shape[1]) % per_word != per_word - 1]
    return bool((fields == 2**settings.bits - 1).any())


def _check_parts(
    parts: Mapping[str, Tensor], settings: PackedSettings, shape: Sequence[int], describe: Describe
) -> None:
    num_outputs, num_inputs = shape
    groups = 1 if settings.group_size == -1 else -(-num_inputs // settings.group_size)
    along = {"gptq": (_words(num_inputs, settings), num_outputs), "awq": (num_inputs, _words(num_outputs, settings))}
    shapes = {
        "qweight": along[settings.method],
        "qzeros": (groups, _words(num_outputs, settings)),
        "scales": (groups, num_outputs),
        "g_idx": (num_inputs,),
    }
    for part, wanted in shapes.items():
        tensor = parts.get(part)
        if tensor is None:
            if part != "g_idx" or (settings.ordered and groups > 1):
                reason = f"; {settings.source} says desc_act" if part == "g_idx" else ""
                raise ModelError(f"{describe(part)} is missing{reason}")
            continue
        if tuple(tensor.shape) != wanted:
            raise ModelError(
                f"{describe(part)} has shape {list(tensor.shape)}, not {list(wanted)} as {settings.method} with"
                f" {settings.bits} bits and group_size {settings.group_size} ({settings.source}) of a map of"
                f" {num_inputs} inputs and {num_outputs} outputs has"
            )
        if tensor.dtype not in _DTYPES[part]:
            known = " or ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[part])
            raise UnsupportedModelError(f"{describe(part)} is {str(tensor.dtype).removeprefix('torch.')}, not {known}")


def _words(count: int, settings: PackedSettings) -> int:
    return -(-count * settings.bits // _WORD)


def _fields(words: Tensor, bits: int) -> Tensor:
    """Return the fields of rows of int32 words [n, words] as [n, fields] uint8, lowest bits first."""
    units = words.contiguous().view(torch.uint8)  # little-endian, as the files
    places = range(0, 8, bits)
    if 8 % bits:  # fields lie across bytes, eight of them in as many bytes as they have bits
        of_unit = pad(units, (0, -units.shape[1] % bits)).unflatten(1, (-1, bits)).int()
        units = sum((of_unit[:, :, i] << 8 * i for i in range(1, bits)), of_unit[:, :, 0])
        places = range(0, 8 * bits, bits)
    parts = [((units >> place) & (2**bits - 1)).to(torch.uint8) for place in places]
    return torch.stack(parts, dim=-1).flatten(1)


def _in_order(fields: Tensor) -> Tensor:
    """Return AWQ's nibbles of outputs [n, out] in the order of the outputs."""
    return fields.unflatten(1, (-1, len(_AWQ_ORDER)))[:, :, _AWQ_ORDER].flatten(1)


def _zeros(qzeros: Tensor, settings: PackedSettings, num_outputs: int) -> Tensor:
    """Return the code of zero of each group, [groups, out] uint8."""
    bits, offset = settings.bits, settings.zero_offset
    if settings.method == "awq":
        return _in_order(_fields(qzeros, bits))[:, :num_outputs]
    if settings.borrows and offset and _WORD % bits == 0:
        qzeros, offset = qzeros + sum(offset << place for place in range(0, _WORD, bits)), 0  # wraps around
    return ((_fields(qzeros, bits) + offset) & (2**bits - 1))[:, :num_outputs]


def _middle(zeros: Tensor, settings: PackedSettings, describe: Describe) -> int:
    """Return the zero of symmetric codes; ModelError where the file has another."""
    middle = 2 ** (settings.bits - 1)
    if bool((odd := zeros[zeros != middle]).numel()):
        raise ModelError(
            f"{describe('qzeros')} gives codes a zero of {int(odd[0])}, not the {middle} of symmetric ones; sym or"
            f" checkpoint_format (gptq or gptq_v2) in {settings.source} does not tell what the file holds"
        )
    return middle


def _half_precision(scales: Tensor, describe: Describe) -> Tensor:
    """Return scales in half precision, which must not change them."""
    if not bool(torch.isfinite(scales).all()):
        raise ModelError(f"{describe('scales')} holds NaN or infinite values")
    half = scales.half()
    if not torch.equal(half.double(), scales.double()):
        kind = str(scales.dtype).removeprefix("torch.")
        raise UnsupportedModelError(f"{describe('scales')} is {kind} and holds values that float16 cannot hold")
    return half


def _adjacent_groups(
    g_idx: Tensor | None, settings: PackedSettings, num_inputs: int, describe: Describe
) -> tuple[int, Tensor]:
    """Return a supported size of groups of adjacent inputs, and of each of them the group of the file.

    Groups of other sizes are several of ours. Raises UnsupportedModelError where there is no such size.
    """
    per_group = num_inputs if settings.group_size == -1 else min(settings.group_size, num_inputs)
    plain = torch.arange(num_inputs) // per_group
    group_of = plain if g_idx is None else g_idx.long()
    if not torch.equal(group_of.unique(), plain.unique()):
        raise ModelError(f"{describe('g_idx')} does not give each of the {int(plain[-1]) + 1} groups its inputs")
    for size in reversed(GROUP_SIZES):
        first = group_of[::size]
        fits = settings.group_size == -1 or size <= settings.group_size
        if fits and torch.equal(first.repeat_interleave(size)[:num_inputs], group_of):
            return size, first
    if torch.equal(group_of, plain):
        raise UnsupportedModelError(
            f"{settings.source}: group_size {settings.group_size} is not supported; multiples of {GROUP_SIZES[0]} are"
        )
    raise UnsupportedModelError(
        f"{describe('g_idx')} spreads the inputs of a group (quantized with desc_act, in order of activation), which"
        " is not supported; adjacent inputs must share a scale"
    )
