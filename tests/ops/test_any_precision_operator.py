"""The operator as PyTorch sees it, and when the matrices packed for the kernels are made, made anew and let go."""

from __future__ import annotations

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from quicksilver.ops import any_precision_linear, native
from quicksilver.ops.any_precision_linear import StoredMatrix
from quicksilver.quant import AnyPrecisionLinear
from quicksilver.quant.codes import AnyPrecisionCodes
from quicksilver.quant.linear import keeping_expanded
from tests import HANGS
from tests.ops.any_precision import arguments, assert_close, draw, draw_bits, module

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")


def operator() -> torch._ops.OpOverload:
    return torch.ops.quicksilver.any_precision_linear.default


@pytest.mark.parametrize("each", [True, False], ids=["bits", "uniform"])
def test_opcheck_accepts_the_operator(each: bool) -> None:
    linear, x = module(70, 100), draw(3, 70)
    bits = draw_bits(3, 70) if each else None
    torch.library.opcheck(operator(), arguments(linear.stored, x, bits, 6))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_gives_the_same(backend: str) -> None:
    linear, x, bits = module(70, 100), draw(3, 70), draw_bits(3, 70)
    stored = linear.stored

    def doubled(x: Tensor, bits: Tensor) -> Tensor:
        return 2 * operator()(*arguments(stored, x, bits))

    compiled = torch.compile(doubled, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(x, bits), doubled(x, bits))
        assert torch.equal(compiled(x + 1, bits), doubled(x + 1, bits))


def test_what_does_not_fit_is_refused() -> None:
    linear, x = module(70, 100), draw(3, 70)
    stored, bits = linear.stored, draw_bits(3, 70)
    wrong = {
        "rows": (x[:, :69], bits),
        "rows must be": (x.double(), bits),
        "bits must be": (x, bits[:2]),
        "uint8": (x, bits.int()),
        "not 9": (x, 9),
        "2 or 0 bits, not 200": (x, bits.masked_fill(bits == 4, 200)),
        "2 or 0 bits, not 3": (x, bits.masked_fill(bits == 4, 3)),
    }
    for message, (rows, given) in wrong.items():
        with pytest.raises(ValueError, match=message):
            any_precision_linear.any_precision_linear(rows, stored, given)


def malformed() -> dict[str, tuple[str, StoredMatrix]]:
    """Return matrices that are none, and what is said of each."""
    stored, few = module(70, 100).stored, module(70, 20).stored
    planes = list(stored.planes)
    empty = StoredMatrix([p[:, :0] for p in planes], few.exponents[:, :0], few.zeros[:, :0], few.constants, 32, 0)

    def first(count: int) -> StoredMatrix:
        return stored._replace(
            planes=[p[:count] for p in planes], exponents=stored.exponents[:count], zeros=stored.zeros[:count]
        )

    return {
        "no outputs": ("got 0 in", empty),
        "no inputs": ("has input channels", first(0)),
        "groups of nothing": ("groups of 0", few._replace(group_size=0)),
        "groups of 16": (
            "groups of 16",
            few._replace(group_size=16, exponents=few.exponents.expand(70, 2), zeros=few.zeros.expand(70, 2)),
        ),
        "three planes": ("got 3", stored._replace(planes=planes[:3])),
        "short planes": (r"planes must be \[70, 25\]", stored._replace(planes=[*planes[:3], planes[3][:69]])),
        "narrow planes": (r"planes must be \[70, 25\]", stored._replace(planes=[p[:, :24] for p in planes])),
        "planes of floats": ("planes must be", stored._replace(planes=[p.float() for p in planes])),
        "signed exponents": ("exponents must be", stored._replace(exponents=stored.exponents.view(torch.int8))),
        "flat exponents": ("has input channels", stored._replace(exponents=stored.exponents[0, 0])),
        "zeros of another": (r"zeros must be \[70, 4\]", stored._replace(zeros=few.zeros)),
        "few constants": (r"constants must be \[21\]", stored._replace(constants=stored.constants[:20])),
        "real constants": ("constants must be", stored._replace(constants=stored.constants.view(torch.float32))),
    }


@pytest.mark.parametrize("name", malformed())
def test_a_matrix_that_is_none_is_refused(name: str) -> None:
    message, stored = malformed()[name]
    x = draw(3, stored.exponents.shape[0] if stored.exponents.dim() else 70)
    with pytest.raises(ValueError, match=message):
        any_precision_linear.any_precision_linear(x, stored, 8)


def test_gradients_are_refused_and_not_cut() -> None:
    linear, x = module(70, 100), draw(3, 70).requires_grad_()
    y = any_precision_linear.any_precision_linear(x, linear.stored, 8)
    with pytest.raises(RuntimeError, match="any_precision_linear has no gradient"):
        y.sum().backward()
    linear(x, kernels="native").sum().backward()  # PyTorch's way
    assert x.grad is not None


def test_rows_need_not_be_contiguous() -> None:
    linear, x, bits = module(70, 100), draw(3, 140)[:, ::2], draw_bits(70, 3).T
    y = any_precision_linear.any_precision_linear(x, linear.stored, bits)
    assert torch.equal(y, any_precision_linear.any_precision_linear(x.contiguous(), linear.stored, bits.contiguous()))


def test_inference_mode_is_no_obstacle() -> None:
    with torch.inference_mode():
        linear, x = module(70, 100), draw(3, 70)
        assert_close(linear(x, kernels="native"), linear, x, torch.full(x.shape, 8))


def with_tables(linear: AnyPrecisionLinear, shift: float) -> AnyPrecisionLinear:
    codes = linear.codes
    tables = {bits: table + shift for bits, table in codes.tables.items()}
    return AnyPrecisionLinear(AnyPrecisionCodes(codes.planes, codes.grid, codes.num_outputs, tables), None)


def test_a_matrix_whose_levels_are_not_whole_is_left_to_pytorch() -> None:
    linear, x = with_tables(module(70, 100), 0.25), draw(3, 70)
    assert not any_precision_linear.has_whole_levels(linear.stored)
    assert any_precision_linear.prepared(linear.stored) is None
    with pytest.raises(ValueError, match="whole 8-bit code"):
        any_precision_linear.any_precision_linear(x, linear.stored, 4)
    assert torch.equal(linear(x, 4, kernels="native"), linear(x, 4))


def check(linear: AnyPrecisionLinear) -> None:
    x, bits = draw(3, linear.num_inputs), draw_bits(3, linear.num_inputs)
    assert_close(linear(x, bits, kernels="native"), linear, x, bits)


def test_a_matrix_is_packed_once_and_anew_where_its_tensors_change() -> None:
    linear, other = module(70, 100), module(70, 100, seed=9, spread=0.5)
    check(linear)
    first = any_precision_linear.prepared(linear.stored)
    check(linear)
    assert any_precision_linear.prepared(linear.stored) is first
    linear.load_state_dict(other.state_dict())  # in place
    check(linear)
    assert any_precision_linear.prepared(linear.stored) is not first
    linear.load_state_dict(module(70, 100, seed=10).state_dict(), assign=True)
    check(linear)
    linear.plane_0 = torch.zeros_like(linear.get_buffer("plane_0"))
    check(linear)
    linear.get_buffer("exponents")[3] = 17
    check(linear)
    check(copy.deepcopy(linear))
    check(linear.to(torch.float64).to(torch.float32))


def test_a_view_of_a_packed_matrix_is_a_matrix_of_its_own() -> None:
    """Its tensors begin where the whole matrix's do, and have been written to as often."""
    linear, x = module(64, 100), draw(3, 64)
    check(linear)
    planes, exponents, zeros, constants, *sizes = linear.stored
    first = StoredMatrix([p[:32] for p in planes], exponents[:32], zeros[:32], constants, *sizes)
    y = any_precision_linear.any_precision_linear(x[:, :32], first, 8)
    bits = torch.full(x.shape, 8).masked_fill(torch.arange(64) >= 32, 0)
    assert_close(y, linear, x, bits)


def test_a_packed_matrix_goes_when_any_of_its_tensors_goes() -> None:
    linear, before = module(70, 100), len(any_precision_linear._entries)
    check(linear)
    assert len(any_precision_linear._entries) == before + 1
    linear.plane_3 = linear.get_buffer("plane_3").clone()
    assert len(any_precision_linear._entries) == before
    check(linear)
    check(linear)
    assert len(any_precision_linear._entries) == before + 1
    del linear
    assert len(any_precision_linear._entries) == before


def test_the_kernels_take_rows_in_float32_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, calls = module(70, 100), []
    run = any_precision_linear.multiply
    monkeypatch.setattr("quicksilver.quant.linear.multiply", lambda *args: calls.append(1) or run(*args))

    def uses_kernels(x: Tensor, kernels: native.Kernels = "native") -> bool:
        calls.clear()
        rows, y = x.reshape(-1, 70), linear(x, 4, kernels=kernels)
        assert y.shape == (*x.shape[:-1], 100)
        assert y.dtype == x.dtype
        assert_close(y.reshape(-1, 100), linear, rows, torch.full(rows.shape, 4))
        return bool(calls)

    assert uses_kernels(draw(1, 70))
    assert uses_kernels(draw(2, 300, 70))
    assert not uses_kernels(draw(0, 70))
    assert not uses_kernels(draw(1, 70).double())
    assert not uses_kernels(draw(1, 70), "torch")
    assert not uses_kernels(draw(1, 70).requires_grad_())
    with torch.no_grad():
        assert uses_kernels(draw(1, 70).requires_grad_())
    with keeping_expanded(linear):
        assert not uses_kernels(draw(1, 70))


@pytest.mark.parametrize("bits", ["one", "by row", "by channel"])
def test_a_row_is_the_same_however_many_others_there_are(bits: str) -> None:
    linear, x = module(70, 100), draw(700, 70)
    chosen = {"one": None, "by row": draw_bits(700, 1)[:, 0], "by channel": draw_bits(700, 70)}[bits]

    def products(rows: slice) -> Tensor:
        return linear(x[rows], 6 if chosen is None else chosen[rows], kernels="native")

    whole = products(slice(None))
    for count in (1, 16, 17, 33, 129, 513):
        assert torch.equal(products(slice(100, 100 + count)), whole[100 : 100 + count])


def test_widths_by_row_and_bias() -> None:
    linear, x = module(70, 100), draw(4, 70)
    linear.bias = torch.nn.Parameter(draw(100, seed=8), requires_grad=False)
    bits = torch.tensor([8, 0, 2, 4], dtype=torch.uint8)
    y = linear(x, bits, kernels="native") - linear.bias
    assert_close(y, linear, x, bits[:, None].expand(4, 70))
    assert torch.equal(linear(x, 0, kernels="native"), linear(x, 0))


def test_threads_of_python_do_not_disturb_one_another() -> None:
    linears = [module(90, 300, seed=seed) for seed in range(4)]
    rows = [(draw(4, 90, seed=seed), draw_bits(4, 90, seed=seed)) for seed in range(4)]
    alone = [linear(x, bits, kernels="native") for linear, (x, bits) in zip(linears, rows, strict=True)]

    def again(i: int) -> bool:
        torch.set_num_threads(1)
        return torch.equal(linears[i](*rows[i], kernels="native"), alone[i])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(again, [i % 4 for i in range(400)]))


FORKED = """
import os, torch
from tests.ops.any_precision import draw, draw_bits, module
torch.set_num_threads(2)
linear, x, bits = module(130, 700), draw(4, 130), draw_bits(4, 130)
before = linear(x, bits, kernels="native")  # the pool has threads now
child = os.fork()
if child == 0:
    same = all(torch.equal(linear(x, bits, kernels="native"), before) for _ in range(20))
    os._exit(0 if same else 1)
assert all(torch.equal(linear(x, bits, kernels="native"), before) for _ in range(20))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_forked_process_multiplies_too() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
