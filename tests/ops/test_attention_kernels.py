"""The kernels' attention alone: its definition, and that how work is shared and what lies around it change no bit."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quicksilver.cache.coded import decode, encode
from quicksilver.ops import native, ragged_attention
from tests import tolerances
from tests.ops.any_precision import INSTRUCTION_SETS, using

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")

BITS = pytest.mark.parametrize("bits", [32, 16, 8])
SHAPES = [(9, 3, 64), (14, 2, 64), (12, 2, 128), (4, 4, 16), (8, 1, 80), (3, 1, 20), (5, 1, 7), (4, 2, 256)]
COUNTS = [1, 2, 15, 16, 17, 127, 128, 129, 300]
PAGE = mmap.PAGESIZE


@dataclass
class Kept:
    """Entries of one sequence as a cache keeps them."""

    bits: int
    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    masses: Tensor | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, bits: int, masses: Tensor | None = None) -> Kept:
        if bits == 8:
            (keys, key_scales), (values, value_scales) = encode(keys), encode(values)
            return cls(bits, keys, values, key_scales, value_scales, masses)
        dtype = torch.float32 if bits == 32 else torch.bfloat16
        return cls(bits, keys.to(dtype), values.to(dtype), masses=masses)

    @property
    def place(self) -> list[int]:
        tensors = self.keys, self.values, self.key_scales, self.value_scales, self.masses
        return [0 if each is None else each.data_ptr() for each in tensors]

    def floats(self) -> tuple[Tensor, Tensor]:
        if self.key_scales is None or self.value_scales is None:
            return self.keys.double(), self.values.double()
        return decode(self.keys, self.key_scales, torch.float64), decode(self.values, self.value_scales, torch.float64)


def entries(n: int, kv_heads: int, head_dim: int, bits: int, seed: int = 0, masses: bool = False) -> Kept:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, n, kv_heads, head_dim, generator=generator)
    of = torch.randint(1, 5, (n,), generator=generator, dtype=torch.int32) if masses else None
    return Kept.of(keys * 2, values, bits, of)


def attend(
    queries: Tensor,
    rows: Sequence[tuple[int, int, int]],
    sequences: Sequence[Kept],
    skip_below: float = 0.0,
    softcap: float = 0.0,
    threads: int = 1,
) -> tuple[Tensor, list[int]]:
    """Return what rows (sequence, first, end) attend to, and what was left out."""
    num_heads, head_dim = queries.shape[1:]
    out, kv_heads = torch.full_like(queries, float("nan")), sequences[0].keys.shape[1]
    fields, places = [x for row in rows for x in row], [x for kept in sequences for x in kept.place]
    shape = num_heads, kv_heads, head_dim, sequences[0].bits
    options = head_dim**-0.5, skip_below, 1.0, softcap
    counts = native.extension().attend(
        queries.data_ptr(), out.data_ptr(), *shape, fields, places, len(sequences), *options, threads
    )
    return out, counts


def defined(
    query: Tensor, kept: Kept, first: int, end: int, skip_below: float = 0.0, softcap: float = 0.0
) -> tuple[Tensor, list[int]]:
    """Return the same for one row by PyTorch, in float64."""
    keys, values = (each[first:end] for each in kept.floats())
    positions, masses = torch.arange(end - first), None if kept.masses is None else kept.masses[first:end]
    found = ragged_attention(
        query.double()[None],
        keys,
        values,
        positions[-1:],
        positions,
        query.shape[-1] ** -0.5,
        newest=True,
        masses=masses,
        skip_below=skip_below,
        softcap=softcap or None,
    )
    return found.output[0], [int(count) for count in found.skipped]


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


@BITS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention(shape: tuple[int, int, int], bits: int, isa: None) -> None:
    for n in COUNTS:
        for masses, softcap, first in ((False, 0.0, 0), (True, 1.5, n // 3)):
            kept = entries(n, *shape[1:], bits, seed=n, masses=masses)
            queries = torch.randn(1, shape[0], shape[2], generator=torch.Generator().manual_seed(n))
            found, skipped = attend(queries, [(0, first, n)], [kept], softcap=softcap)
            wanted, _ = defined(queries[0], kept, first, n, softcap=softcap)
            torch.testing.assert_close(found[0].double(), wanted, atol=tolerances.ATTENDED, rtol=0)
            assert skipped == [0, 0, 0]


@BITS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_two_steps_it_leaves_out_what_the_definition_does(shape: tuple[int, int, int], bits: int, isa: None) -> None:
    for n in (1, 17, 300):
        kept = entries(n, *shape[1:], bits, seed=n, masses=n == 17)
        queries = torch.randn(1, shape[0], shape[2], generator=torch.Generator().manual_seed(n))
        found, skipped = attend(queries, [(0, n // 3, n)], [kept], skip_below=0.7)
        wanted, counts = defined(queries[0], kept, n // 3, n, skip_below=0.7)
        torch.testing.assert_close(found[0].double(), wanted, atol=tolerances.ATTENDED, rtol=0)
        assert skipped == counts


@BITS
@pytest.mark.parametrize("skip_below", [0.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[5:6], ids=str)
def test_nothing_but_a_row_and_its_entries_matters(shape: tuple[int, int, int], skip_below: float, bits: int) -> None:
    """Instruction sets, threads more and fewer than rows and blocks, mates, and their windows change no bit."""
    sequences = [entries(n, *shape[1:], bits, seed=n) for n in (700, 40)]
    rows = [(0, 0, 700), (0, 300, 699), (1, 0, 1), (0, 0, 128), (1, 7, 40), (0, 127, 129), (0, 256, 384), (0, 0, 699)]
    queries = torch.randn(len(rows), shape[0], shape[2], generator=torch.Generator().manual_seed(1))
    wanted: list[Tensor] | None = None
    for name in INSTRUCTION_SETS:
        with using(name):
            alone = [attend(queries[i : i + 1], rows[i : i + 1], sequences, skip_below)[0] for i in range(len(rows))]
            wanted = wanted or alone
            for threads in (1, 2, 3, 7, 33):
                for some in (slice(None), slice(2), slice(None, None, -1)):
                    mates = queries[: len(rows)].flip(0) if some.step else queries[some]
                    found, _ = attend(mates.contiguous(), rows[some], sequences, skip_below, threads=threads)
                    assert torch.equal(found, torch.cat(wanted[some]))
            assert all(torch.equal(one, other) for one, other in zip(alone, wanted, strict=True))


@BITS
@pytest.mark.parametrize("skip_below", [0.0, 0.5])
def test_what_a_row_does_not_see_is_not_read(bits: int, skip_below: float, isa: None) -> None:
    for n, first, end in ((40, 5, 20), (300, 130, 259), (300, 0, 1)):
        kept = entries(n, 2, 20, bits, seed=n)
        queries = torch.randn(1, 4, 20, generator=torch.Generator().manual_seed(n))
        wanted, _ = attend(queries, [(0, first, end)], [kept], skip_below)
        for hidden in (slice(first), slice(end, None)):
            for tensor in (kept.keys, kept.values, kept.key_scales, kept.value_scales):
                if tensor is not None:
                    tensor[hidden] = float("nan") if tensor.is_floating_point() else 99
        assert torch.equal(attend(queries, [(0, first, end)], [kept], skip_below)[0], wanted)


def at_the_end_of_memory(tensor: Tensor | None) -> tuple[Tensor | None, mmap.mmap | None]:
    """Return a copy behind which nothing may be read."""
    if tensor is None:
        return None, None
    size = -(-tensor.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + PAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    copied = whole[size - tensor.nbytes : size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + size), ctypes.c_size_t(PAGE), 0) == 0
    return copied, memory


@BITS
@pytest.mark.parametrize("head_dim", [7, 20, 64, 80])
def test_nothing_behind_the_entries_is_read(head_dim: int, bits: int, isa: None) -> None:
    for n in (1, 17, 129):
        kept = entries(n, 2, head_dim, bits)
        queries = torch.randn(1, 4, head_dim, generator=torch.Generator().manual_seed(n))
        wanted = [attend(queries, [(0, 0, n)], [kept], skip_below)[0] for skip_below in (0.0, 0.5)]
        tensors = kept.keys, kept.values, kept.key_scales, kept.value_scales
        moved, memories = zip(*map(at_the_end_of_memory, tensors), strict=True)
        guarded = Kept(bits, *moved)
        found = [attend(queries, [(0, 0, n)], [guarded], skip_below)[0] for skip_below in (0.0, 0.5)]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        del moved, guarded, memories


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(value: float, isa: None) -> None:
    kept = entries(200, 2, 16, 32)
    kept.keys[150, 1, 3] = value
    queries = torch.ones(1, 4, 16)
    found, _ = attend(queries, [(0, 0, 200)], [kept])
    assert found[0, :2].isfinite().all()
    assert found[0, 2:].isnan().all()
    kept.keys[150, 1, 3] = float("-inf") if value == float("inf") else 0.0  # weighs nothing
    kept.keys[:128, 1, 3] = float("-inf")  # nor does a whole block
    assert attend(queries, [(0, 0, 200)], [kept])[0].isfinite().all()


def test_scores_of_any_size_are_weighed_rightly(isa: None) -> None:
    """By the largest of all blocks: in units of their own, those of others would be none or infinite."""
    kept = entries(400, 1, 16, 32)
    kept.keys[:, 0, 0] = torch.linspace(-4000, 4000, 400)
    queries = torch.zeros(1, 1, 16)
    queries[..., 0] = 1.0
    for sign in (1.0, -1.0):
        found, _ = attend(queries * sign, [(0, 0, 400)], [kept])
        wanted, _ = defined(queries[0] * sign, kept, 0, 400)
        torch.testing.assert_close(found[0].double(), wanted, atol=tolerances.ATTENDED, rtol=0)


@pytest.mark.parametrize(
    ("message", "shape", "rows", "threads"),
    [
        ("no such heads", (3, 2, 4, 32), [0, 0, 1], 1),
        ("no such heads", (2, 0, 4, 32), [0, 0, 1], 1),
        ("threads", (2, 2, 4, 32), [0, 0, 1], 0),
        ("32, 16 or 8 bits", (2, 2, 4, 4), [0, 0, 1], 1),
        ("1 rows of 3 fields are needed, got 4", (2, 2, 4, 32), [0, 0, 1, 0], 1),
        ("sees nothing", (2, 2, 4, 32), [0, 1, 1], 1),
        ("of a sequence that there is not", (2, 2, 4, 32), [1, 0, 1], 1),
    ],
)
def test_what_does_not_fit_is_refused(message: str, shape: tuple[int, ...], rows: list[int], threads: int) -> None:
    with pytest.raises(ValueError, match=message):
        native.extension().attend(0, 0, *shape, rows, [0] * 5, 1, 1.0, 0.0, 1.0, 0.0, threads)
