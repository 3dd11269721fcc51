"""Products whose every operand ends, or begins, at a page that must not be touched; run as a program of its own.

Whatever reads or writes past an operand ends the process, so that the last line printed says of what.
"""

from __future__ import annotations

import ctypes
import mmap
from itertools import product as pairs

import torch
from torch import Tensor

from quicksilver.ops import native
from quicksilver.ops.any_precision_linear import StoredMatrix, native_matrix
from quicksilver.weights.codes import CODE_BITS
from quicksilver.weights.planes import UNITS
from tests.ops.any_precision import FORMS, INSTRUCTION_SETS, draw, draw_bits, module, plain, product, using

_PROT_NONE = 0
_CASES = tuple(pairs(CODE_BITS, UNITS, FORMS))


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """Return a copy that ends where a page without access begins, or begins where one ends; the memory stays."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    held = -(-size // page) * page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    arguments = ctypes.c_size_t(held + 2 * page), mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON
    memory = libc.mmap(None, *arguments, -1, ctypes.c_long(0))
    for guard in (memory, memory + page + held):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), _PROT_NONE) == 0
    at = memory + page + (held - size if at_end else 0)
    copied = torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=tensor.dtype).view(tensor.shape)
    return copied.copy_(tensor)


def check(stored: StoredMatrix, x: Tensor, bits: Tensor, at_end: bool) -> None:
    """Multiply guarded operands, into guarded outputs; what comes out is what unguarded ones give."""
    guards = [guarded(t, at_end) if isinstance(t, Tensor) else t for t in stored]
    alone = StoredMatrix(*guards)  # type: ignore[arg-type]
    rows, each = guarded(x, at_end), guarded(bits, at_end)
    for read in (None, each, guarded(bits[:, 0].contiguous(), at_end)):
        y = guarded(torch.full((len(x), stored.num_outputs), float("nan")), at_end)
        native.extension().multiply_rows(
            native_matrix(alone),
            *(rows.data_ptr(), y.data_ptr(), len(x), 0 if read is None else read.data_ptr()),
            *(read is not None and read.dim() == 2, 8, 0, 0, 0.0, 1),
        )
        assert torch.equal(y, product(stored, x, 8 if read is None else read))


def check_rooms() -> None:
    """Multiply with ever more tiles, and then many: memory that was written past is found when it is let go."""
    for unit, tiles in pairs((1, 4), (66, 67, 68, 69, 127, 200)):
        codes = torch.full((64 * tiles, 32), 170, dtype=torch.uint8)
        assert product(plain(codes, 8, unit=unit), torch.ones(1, 32)).eq(170.0 * 32).all()


def main() -> None:
    """Run all cases on all instruction sets."""
    torch.set_num_threads(1)
    for isa in INSTRUCTION_SETS:
        with using(isa):
            print(isa, "rooms", flush=True)
            check_rooms()
            for i, (bits, unit, form) in enumerate(_CASES):
                num_inputs, num_outputs = (1, 1) if i % 7 == 0 else (5 + 37 * (i % 9), 1 + 61 * (i % 4))
                print(isa, bits, unit, form, num_inputs, num_outputs, flush=True)
                linear = module(num_inputs, num_outputs, bits, (16, 32, 64, 128)[i % 4], form, unit)
                rows = (1, 3, 18)[i % 3]
                x, each = draw(rows, num_inputs), draw_bits(rows, num_inputs)
                check(linear.stored, x, each, at_end=i % 5 > 0)


if __name__ == "__main__":
    main()
