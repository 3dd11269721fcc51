"""Where quantized matrices lie in memory: those of one input side by side, all in large pages.

Weights are streamed, and a page walk every 4 KiB would break the stream. Modules keep what they hold; where it lies is
all that changes.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from quicksilver.ops.any_precision_linear import StoredMatrix
from quicksilver.weights import planes
from quicksilver.weights.linear import BUFFERS, AnyPrecisionWeight

_LARGE_PAGE = 2**21
_SLAB = 16 * _LARGE_PAGE
_LINE = 64  # bytes


class LargePages:
    """Memory for tensors, in slabs that live as long as a tensor in them."""

    def __init__(self) -> None:
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, row: int | None = None) -> Tensor:
        """Return a tensor without content, on the CPU; its rows are contiguous, and `row` elements apart if given."""
        dense = torch.Size(shape[1:]).numel()
        row = dense if row is None else row
        size = shape[0] * row * dtype.itemsize
        if self._used + size > len(self._slab):
            self._slab, self._used = _new_slab(max(size, _SLAB)), 0
        begin, self._used = self._used, -(-(self._used + size) // _LINE) * _LINE
        return self._slab[begin : begin + size].view(dtype).view(shape[0], row)[:, :dense].view(shape)


def _new_slab(size: int) -> Tensor:
    memory = mmap.mmap(-1, size + _LARGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _LARGE_PAGE :][:size]


def lay_out(modules: Sequence[AnyPrecisionWeight], pages: LargePages) -> StoredMatrix | None:
    """Lay matrices of one input side by side, in their order; return them as one, None where they cannot be.

    Their codes must have as many bits and their scales one form. What lies so already is left where it is.
    """
    if len(modules) > 1 and len({_form(module) for module in modules}) == 1:
        if not _lie_together(modules):
            _move(modules, pages)
        return _joined(modules)
    for module in modules:
        if not module.is_laid_out:
            _move([module], pages)
    return None


def _form(module: AnyPrecisionWeight) -> tuple[object, ...]:
    stored = module.stored
    dtypes = tuple(None if t is None else t.dtype for t in stored[:7])  # type: ignore[union-attr]
    return (module.unit, stored.num_inputs, *stored[9:], *dtypes)


def _held(module: AnyPrecisionWeight) -> dict[str, Tensor]:
    return {name: tensor for name in BUFFERS if (tensor := module._buffers[name]) is not None}


def _lie_together(modules: Sequence[AnyPrecisionWeight]) -> bool:
    """Whether each buffer's parts are one run in each row."""
    for name, lead in _held(modules[0]).items():
        parts = [_held(module)[name] for module in modules]
        at, row = lead.data_ptr(), lead.stride(0)
        for part in parts:
            if part.data_ptr() != at or part.stride(0) != row:
                return False
            at += part[0].numel() * part.element_size()
    return True


def _move(modules: Sequence[AnyPrecisionWeight], pages: LargePages) -> None:
    for name, lead in _held(modules[0]).items():
        parts = [_held(module)[name] for module in modules]
        shape = (lead.shape[0], sum(part.shape[1] for part in parts), *lead.shape[2:])
        whole = pages.empty(shape, lead.dtype, _apart(shape) if name in ("high", "low") else None)
        torch.cat(parts, dim=1, out=whole)
        for module, part in zip(modules, whole.split([part.shape[1] for part in parts], dim=1), strict=True):
            module._buffers[name] = part
    for module in modules:
        module.mark_laid_out()


def _apart(shape: Sequence[int]) -> int:
    """Return how many bytes apart units of a plane are laid.

    Of four bits, an odd number of cache lines, so that units do not compete for the same places of a cache; of two
    bits, half as far.
    """
    run, share = torch.Size(shape[1:]).numel(), 32 // shape[-1]
    return (-(-run * share // _LINE) | 1) * _LINE // share


def _joined(modules: Sequence[AnyPrecisionWeight]) -> StoredMatrix:
    lead, last = modules[0].stored, modules[-1]
    padded = sum(planes.padded(module.num_outputs) for module in modules)

    def whole(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        width = padded // planes.TILE if part.dim() > 2 else padded
        return part.as_strided((part.shape[0], width, *part.shape[2:]), part.stride())

    tensors = {name: whole(part) for name, part in lead._asdict().items() if isinstance(part, Tensor)}
    num_outputs = padded - planes.padded(last.num_outputs) + last.num_outputs
    return lead._replace(**tensors, num_outputs=num_outputs)
