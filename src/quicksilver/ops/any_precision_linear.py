"""Rows times a quantized matrix, by the compiled kernels, which read the matrix where it is."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quicksilver.ops import native

_MAX_BITS, _BITS = 8, (0, 2, 4, 6, 8)
_UNITS, _GROUP_SIZES, _BLOCK = (1, 4, 8, 16, 32), (16, 32, 64, 128), 256
_KINDS = {torch.float16: "half", torch.uint8: "unsigned", torch.int8: "signed"}
_DTYPES = {
    "steps": (torch.float16, torch.uint8, torch.int8),
    "offsets": (torch.float16, torch.uint8),
    "zeros": (torch.uint8,),
    "block_steps": (torch.float16,),
    "block_offsets": (torch.float16,),
}


class StoredMatrix(NamedTuple):
    """A matrix of codes as modules keep it; see `weights/planes.py` and `weights/codes.py`."""

    high: Tensor  # [units, tiles, unit, 32] uint8, the last three dimensions contiguous
    low: Tensor | None  # [units, tiles, unit, 16 or 32] uint8, likewise
    steps: Tensor  # [groups, 64 * tiles] float16, or uint8 or int8 with block_steps; one stride for all scales
    offsets: Tensor | None  # [groups, 64 * tiles] float16, or uint8 with block_offsets
    zeros: Tensor | None  # [groups, 64 * tiles] uint8, codes of zero
    block_steps: Tensor | None  # [blocks, 64 * tiles] float16
    block_offsets: Tensor | None  # likewise
    num_inputs: int
    num_outputs: int
    bits: int  # 4, 6 or 8 of each code
    group_size: int  # inputs that share a scale
    zero: int  # the code of zero, where there are neither offsets nor zeros
    factor: float  # of all scales


class NormOperands(NamedTuple):
    """A norm over the last dimension: LayerNorm, or by the root mean square where there is no bias."""

    weight: Tensor  # [d] float32, contiguous
    bias: Tensor | None  # likewise, or None
    epsilon: float  # added to the variance or the mean square

    @property
    def addresses(self) -> tuple[int, int, float]:
        """Where weight and bias lie, 0 for none, and the epsilon, as the kernels take them."""
        return self.weight.data_ptr(), 0 if self.bias is None else self.bias.data_ptr(), self.epsilon


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


def native_matrix(stored: StoredMatrix) -> Any:
    """Return a matrix as the kernels take it: its tensors are read where they are, and must be kept.

    Raises:
        KernelsUnavailableError: there are no kernels.
        ValueError: tensors that are not those of a matrix.
    """
    _check(stored)
    high, low, steps, offsets, zeros, block_steps, block_offsets, *sizes = stored
    num_inputs, num_outputs, bits, group_size, zero, factor = sizes
    kind = "zeros" if zeros is not None else "none" if offsets is None else _KINDS[offsets.dtype]
    return native.extension().Matrix(
        num_inputs,
        num_outputs,
        bits,
        group_size,
        high.shape[2],
        high.data_ptr(),
        _address(low),
        high.stride(0) if high.shape[0] > 1 else high.numel(),  # PyTorch may call a lone row's anything
        _KINDS[steps.dtype],
        steps.data_ptr(),
        kind,
        _address(offsets if zeros is None else zeros),
        _address(block_steps),
        _address(block_offsets),
        steps.stride(0),
        zero,
        factor,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(stored: StoredMatrix) -> None:
    """Raise ValueError where the kernels would read past what there is, or take it for something else."""
    tensors = [value for value in stored if isinstance(value, Tensor)]
    problem = "tensors elsewhere than on the cpu" if any(t.device.type != "cpu" for t in tensors) else None
    problem = problem or _problem_of_planes(stored) or _problem_of_scales(stored)
    if problem is not None:
        raise ValueError(f"a matrix cannot have {problem}")


def _problem_of_planes(stored: StoredMatrix) -> str | None:
    high, low, bits = stored.high, stored.low, stored.bits
    if not _is_plane(high, 32) or bits not in (4, 6, 8):
        return f"planes {list(high.shape)} {high.dtype} of {bits} bits"
    units, tiles, unit, _ = high.shape
    if unit not in _UNITS or stored.group_size not in _GROUP_SIZES:
        return f"units of {unit} channels, or groups of {stored.group_size}"
    if units * unit < stored.num_inputs or not 64 * (tiles - 1) < stored.num_outputs <= 64 * tiles:
        return f"planes {list(high.shape)} for {stored.num_outputs} outputs of {stored.num_inputs} inputs"
    if (low is None) != (bits == 4):
        return f"{'no' if low is None else 'a'} second plane of codes of {bits} bits"
    if low is not None and (
        not _is_plane(low, 8 * (bits - 4))
        or low.shape[:3] != high.shape[:3]
        or (units > 1 and low.stride(0) * 4 != high.stride(0) * (bits - 4))
    ):
        return f"a second plane {list(low.shape)} {low.dtype} of codes of {bits} bits beside {list(high.shape)}"
    return None


def _is_plane(plane: Tensor, width: int) -> bool:
    """Whether a tensor is [units, tiles, unit, width] bytes, those of a unit without gaps, units without overlap."""
    return (
        plane.dtype == torch.uint8
        and plane.dim() == 4
        and plane.shape[3] == width
        and plane[:1].is_contiguous()
        and (len(plane) < 2 or plane.stride(0) >= plane[0].numel())
    )


def _problem_of_scales(stored: StoredMatrix) -> str | None:
    groups, blocks = -(-stored.num_inputs // stored.group_size), -(-stored.num_inputs // _BLOCK)
    outputs = 64 * stored.high.shape[1]
    for name in ("steps", "offsets", "zeros", "block_steps", "block_offsets"):
        tensor, rows = getattr(stored, name), blocks if name.startswith("block") else groups
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES[name]:
            return f"{name} of {tensor.dtype}"
        apart = rows > 1 and tensor.stride(0) != stored.steps.stride(0)
        if tensor.shape != (rows, outputs) or tensor.stride(1) != 1 or apart:
            return f"{name} {list(tensor.shape)} in strides of {tensor.stride()} where {[rows, outputs]} are needed"
    for name, of_blocks in (("steps", stored.block_steps), ("offsets", stored.block_offsets)):
        tensor = getattr(stored, name)
        if (tensor is not None and tensor.dtype != torch.float16) != (of_blocks is not None):
            dtype = "nothing" if tensor is None else tensor.dtype
            return f"{name} of {dtype} {'without' if of_blocks is None else 'with'} those of blocks"
    both = stored.offsets is not None and stored.zeros is not None
    return "both offsets and codes of zero" if both else None


def multiply(
    x: Tensor, matrix: Any, bits: Tensor | None = None, uniform: int = _MAX_BITS, norm: NormOperands | None = None
) -> Tensor:
    """Return rows [N, in] float32 times a matrix [out, in] that `native_matrix` gave.

    Activations are rounded to 8 bits for each group of 16 channels. Rows do not depend on one another. A row with a NaN
    or an infinity gives NaN. Shapes, types and bits are not checked: a caller that did not make them calls
    `check_rows`. A norm is applied to the rows before they are multiplied.

    Args:
        x: [N, in] float32.
        matrix: as `native_matrix` gave it.
        bits: uint8 bits to read, [N, in] by channel or [N] by row, or None where `uniform` are read throughout.
        uniform: 8, 6, 4, 2, or 0, which gives zeros; of more than the codes have, all are read.
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


def check_rows(x: Tensor, num_inputs: int, bits: Tensor | None, uniform: int) -> None:
    """Raise ValueError where what is multiplied does not fit."""
    if x.dim() != 2 or x.dtype != torch.float32 or x.shape[1] != num_inputs:
        raise ValueError(f"rows must be [N, {num_inputs}] float32, got {list(x.shape)} {x.dtype}")
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
