"""What tensors a stored matrix of codes must have, by what it says of itself; `of_stored` itself checks nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from quicksilver.errors import ModelError
from quicksilver.weights import planes
from quicksilver.weights.codes import BLOCK, CODE_BITS, GROUP_SIZES
from quicksilver.weights.linear import VERSION
from quicksilver.weights.storage import Expected

EXPECTED_FORM = Expected((7,), (torch.int32,))
_BYTES, _SMALL, _HALVES = (torch.uint8,), (torch.uint8, torch.int8), (torch.int16,)
_HALF_SCALES = ("steps", "offsets", "block_steps", "block_offsets")
_MAX_SHIFT = 126  # powers of two that float32 holds precisely


def check_form(form: Sequence[int], shape: tuple[int, int]) -> None:
    """Raise ModelError, without saying whose, where a form is none, or of a matrix of another shape than [out, in]."""
    num_inputs, num_outputs, bits, group_size, zero, shift, version = form
    if version != VERSION:
        raise ModelError(f"is of version {version}; this version of quicksilver reads {VERSION}")
    if (num_outputs, num_inputs) != shape:
        raise ModelError(f"says a matrix of {[num_outputs, num_inputs]}, and config.json one of {list(shape)}")
    if bits not in CODE_BITS or group_size not in GROUP_SIZES or not -1 <= zero < 2**bits or abs(shift) > _MAX_SHIFT:
        raise ModelError(f"says {bits} bits, groups of {group_size}, a zero of {zero} and a shift of {shift}")


def expected_parts(
    form: Sequence[int], held: Collection[str], shape_of: Callable[[str], Sequence[int]]
) -> dict[str, Expected]:
    """Return what the tensors of a matrix must be by the names of buffers, the form's left out.

    Args:
        form: as `check_form` passed it.
        held: buffers that are stored.
        shape_of: gives the shape of a stored one.

    Raises:
        ModelError: without saying whose, where these cannot be those of one matrix.
    """
    num_inputs, num_outputs, bits, group_size, zero, *_ = form
    tiles = planes.padded(num_outputs) // planes.TILE
    groups, blocks = -(-num_inputs // group_size), -(-num_inputs // BLOCK)
    zeros = [name for name in ("offsets", "zeros") if name in held] + ["form"] * (zero >= 0)
    if len(zeros) != 1:
        raise ModelError(f"has {' and '.join(zeros) if zeros else 'neither offsets nor zeros'}")
    shape = shape_of("high") if "high" in held else ()
    unit = shape[2] if len(shape) == 4 and shape[2] in planes.UNITS else 1
    expected = {"high": Expected((-(-num_inputs // unit), tiles, unit, 32), _BYTES)}
    if bits > planes.HIGH_BITS:
        expected["low"] = Expected((*expected["high"].shape[:3], 8 * (bits - planes.HIGH_BITS)), _BYTES)
    rows, of_blocks = (groups, tiles * planes.TILE), (blocks, tiles * planes.TILE)
    for name, small in (("steps", _SMALL), ("offsets", _BYTES)):
        if name == "offsets" and name not in held:
            continue
        two_levels = f"block_{name}" in held
        expected[name] = Expected(rows, small if two_levels else _HALVES)
        if two_levels:
            expected[f"block_{name}"] = Expected(of_blocks, _HALVES)
    if "zeros" in held:
        expected["zeros"] = Expected(rows, _BYTES)
    return expected


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of scales, among the tensors of a matrix, that hold NaN or infinity; None where none do."""
    for name in _HALF_SCALES:
        tensor = tensors.get(name)
        if tensor is not None and tensor.dtype == torch.int16 and not bool(tensor.view(torch.float16).isfinite().all()):
            return name
    return None
