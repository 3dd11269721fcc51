"""Rows times a quantized matrix, by the compiled kernels."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quicksilver.ops import native

_MAX_BITS, _BITS = 8, (0, 2, 4, 6, 8)
_NUM_PLANES = 4
_GROUP_STEP = 32  # outputs that the kernels read with one scale
_NUM_CONSTANTS = 21


class StoredMatrix(NamedTuple):
    """A matrix [in, out] in any-precision codes, as modules keep it."""

    # four of [in, ceil(out / 4)] uint8, leading bits first, the first code of a byte in its lowest bits
    planes: Sequence[Tensor]
    exponents: Tensor  # [in, groups] uint8
    zeros: Tensor  # [in, groups] uint8
    constants: Tensor  # [21] int32, the bits of float32: the largest scale, the 16 levels of 4 bits, the 4 of 2 bits
    group_size: int  # outputs of one group, a multiple of 32
    num_outputs: int  # out


class NormOperands(NamedTuple):
    """A norm over the last dimension: LayerNorm, or by the root mean square where there is no bias."""

    weight: Tensor  # [d] float32, contiguous
    bias: Tensor | None  # likewise, or None
    epsilon: float  # added to the variance or the mean square

    @property
    def addresses(self) -> tuple[int, int, float]:
        """Where weight and bias lie, 0 for none, and the epsilon, as the kernels take them."""
        return self.weight.data_ptr(), 0 if self.bias is None else self.bias.data_ptr(), self.epsilon


class _Prepared(NamedTuple):
    """A matrix as the kernels want it, what of, and what ends it."""

    # by whether they are for bits by channel; None where the kernels cannot read the matrix
    layouts: dict[bool, Any] | None
    state: tuple[Any, ...]
    owners: tuple[weakref.ref[Any], ...]


_entries: dict[int, _Prepared] = {}
"""By the address of the exponents. An entry goes when any of its tensors' memory does."""


def accepts(rows: Tensor) -> bool:
    """Whether rows [N, in] are such that the kernels are used: float32, on the CPU, without a gradient.

    However many they are: a row's product must not depend on who else is multiplied.
    """
    return (
        rows.shape[0] > 0
        and rows.dtype == torch.float32
        and rows.device.type == "cpu"
        and not (rows.requires_grad and torch.is_grad_enabled())
    )


def has_whole_levels(stored: StoredMatrix) -> bool:
    """Whether the levels of a matrix at fewer bits are whole 8-bit codes, which is what the kernels can read."""
    levels = stored.constants.view(torch.float32)[1:]
    return bool(((levels == levels.round()) & (levels >= 0) & (levels <= 255)).all())


def prepared(stored: StoredMatrix, by_channel: bool | None = None) -> Any:
    """Return a matrix as the kernels want it, None where they cannot read it; made when it is first asked for.

    It is laid out differently where a row's channels may differ in bits; `by_channel` None is for whichever is there.

    Raises:
        KernelsUnavailableError: there are no kernels.
        ValueError: its tensors are not those of a matrix.
    """
    tensors = (*stored.planes, *stored[1:4])
    state = (*map(_state, tensors), *stored[4:])
    key = stored.exponents.data_ptr()
    found = _entries.get(key)
    if found is None or found.state != state:
        _check_stored(stored)
        found = _entries[key] = _Prepared({} if has_whole_levels(stored) else None, state, _owners(key, tensors))
    if found.layouts is None:
        return None
    if by_channel is None:
        by_channel = True in found.layouts
    if by_channel not in found.layouts:
        found.layouts[by_channel] = _pack(stored, by_channel)
    return found.layouts[by_channel]


def multiply(
    x: Tensor, matrix: Any, bits: Tensor | None = None, uniform: int = _MAX_BITS, norm: NormOperands | None = None
) -> Tensor:
    """Return rows [N, in] float32 times a matrix [in, out] that `prepared` gave, for bits by channel where they are.

    Activations are rounded to 16 bits for each block of 64 channels, so results differ from the float product by about
    4e-5 of the largest output. Rows do not depend on one another. A row with a NaN or an infinity gives NaN. Shapes,
    types and bits are not checked: a caller that did not make them calls `check_rows`. A norm is applied to the rows
    before they are multiplied.

    Args:
        x: [N, in] float32.
        matrix: as `prepared` gave it.
        bits: uint8 bits to read, [N, in] by channel or [N] by row, or None where `uniform` are read throughout.
        uniform: 8, 6, 4, 2, or 0, which gives zeros.
        norm: None where rows are multiplied as they come.
    """
    y = x.new_empty((x.shape[0], matrix.num_outputs))
    rows = x if x.is_contiguous() else x.contiguous()
    each = None if bits is None else bits.contiguous()
    native.extension().multiply_rows(
        matrix,
        rows.data_ptr(),
        y.data_ptr(),
        rows.shape[0],
        0 if each is None else each.data_ptr(),
        each is not None and each.dim() == 2,
        uniform,
        *((0, 0, 0.0) if norm is None else norm.addresses),
        torch.get_num_threads(),
    )
    return y


def check_rows(x: Tensor, stored: StoredMatrix, bits: Tensor | None, uniform: int) -> None:
    """Raise ValueError where what is multiplied does not fit."""
    if x.dim() != 2 or x.dtype != torch.float32 or x.shape[1] != stored.exponents.shape[0]:
        raise ValueError(f"rows must be [N, {stored.exponents.shape[0]}] float32, got {list(x.shape)} {x.dtype}")
    if bits is not None and (bits.shape not in (x.shape, x.shape[:1]) or bits.dtype != torch.uint8):
        raise ValueError(
            f"bits must be {list(x.shape)} or {list(x.shape[:1])} uint8, got {list(bits.shape)} {bits.dtype}"
        )
    if bits is not None and bool((wrong := (bits > _MAX_BITS) | (bits % 2 == 1)).any()):
        _check_bits(int(bits[wrong][0]))
    _check_bits(uniform)


def _check_bits(bits: int) -> None:
    """Raise ValueError where there is no such bits."""
    if bits not in _BITS:
        raise ValueError(f"weights are read at 8, 6, 4, 2 or 0 bits, not {bits}")


def _check_stored(stored: StoredMatrix) -> None:
    """Raise ValueError where tensors and sizes are not those of a matrix that has inputs and outputs."""
    out, group_size, exponents = stored.num_outputs, stored.group_size, stored.exponents
    if out < 1 or group_size < 1 or group_size % _GROUP_STEP:
        raise ValueError(
            f"a matrix has outputs, in groups of a multiple of {_GROUP_STEP}; got {out} in groups of {group_size}"
        )
    if exponents.dim() != 2 or exponents.shape[0] < 1 or len(stored.planes) != _NUM_PLANES:
        raise ValueError(
            f"a matrix has input channels and {_NUM_PLANES} planes; got {len(stored.planes)} and exponents"
            f" {list(exponents.shape)}"
        )
    of_group = exponents.shape[0], -(-out // group_size)
    wanted = [
        *(("planes", plane, (exponents.shape[0], -(-out // 4)), torch.uint8) for plane in stored.planes),
        ("exponents", exponents, of_group, torch.uint8),
        ("zeros", stored.zeros, of_group, torch.uint8),
        ("constants", stored.constants, (_NUM_CONSTANTS,), torch.int32),
    ]
    for name, tensor, shape, dtype in wanted:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
            got = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device.type}"
            raise ValueError(f"{name} must be {list(shape)} {dtype} on cpu, got {got}")


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor is, how it lies, and how often it was written to; inference tensors do not count that."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype


def _owners(key: int, tensors: Sequence[Tensor]) -> tuple[weakref.ref[Any], ...]:
    """Return references to tensors' memory that end the entry of a key with it."""
    return tuple(weakref.ref(tensor.untyped_storage(), lambda _: _entries.pop(key, None)) for tensor in tensors)


def _pack(stored: StoredMatrix, by_channel: bool) -> Any:
    largest, *tables = stored.constants.contiguous().view(torch.float32).split([1, 16, 4])
    *planes, exponents, zeros = (tensor.contiguous() for tensor in (*stored.planes, stored.exponents, stored.zeros))
    return native.extension().prepare(
        planes, exponents, zeros, float(largest), *tables, stored.group_size, stored.num_outputs, by_channel
    )
