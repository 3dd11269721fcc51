"""What the kernels take, where it lies, and what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from quicksilver.ops import any_precision_linear, native
from quicksilver.ops.any_precision_linear import StoredMatrix, native_matrix
from quicksilver.weights import AnyPrecisionLinear, planes
from quicksilver.weights.codes import CODE_BITS, GroupedCodes, Scales
from quicksilver.weights.joined import LargePages, lay_out
from quicksilver.weights.linear import keeping_expanded
from tests import HANGS
from tests.ops.any_precision import (
    FORMS,
    assert_close,
    draw,
    draw_bits,
    draw_whole,
    module,
    product,
    products,
    threads,
)

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")


def test_what_does_not_fit_is_refused() -> None:
    linear, x = module(70, 100), draw(3, 70)
    bits = draw_bits(3, 70)
    wrong = {
        r"rows must be \[N, 70\] float32, got \[3, 69\]": (x[:, :69], bits),
        r"rows must be .* torch.float64": (x.double(), bits),
        r"rows must be .* got \[70\]": (x[0], 8),
        r"bits must be \[3, 70\] or \[3\] uint8": (x, bits[:2]),
        "uint8, got .* torch.int32": (x, bits.int()),
        "8, 6, 4, 2 or 0 bits, not 9": (x, 9),
        "2 or 0 bits, not -2": (x, -2),
        "2 or 0 bits, not 200": (x, bits.masked_fill(bits == 4, 200)),
        "2 or 0 bits, not 3": (x, bits.masked_fill(bits == 4, 3)),
    }
    for message, (rows, given) in wrong.items():
        with pytest.raises(ValueError, match=message):
            product(linear, rows, given)


def malformed() -> dict[str, tuple[str, StoredMatrix]]:
    """Return matrices that are none, and what is said of each."""
    whole, four = module(300, 100, form="two levels").stored, module(300, 100, 4, form="zeros").stored
    low, offsets, zeros, steps = whole.low, whole.offsets, four.zeros, whole.steps
    assert low is not None
    assert offsets is not None
    assert zeros is not None
    wide = module(300, 200).stored.high
    floats = torch.ones(steps.shape)
    return {
        "no outputs": ("for 0 outputs", whole._replace(num_outputs=0)),
        "no inputs": ("inputs, outputs", four._replace(num_inputs=0, steps=four.steps[:0], zeros=zeros[:0])),
        "too many inputs": ("321 inputs", whole._replace(num_inputs=321)),
        "too many outputs": ("129 outputs", whole._replace(num_outputs=129)),
        "too few outputs": ("64 outputs", whole._replace(num_outputs=64)),
        "groups of nothing": ("groups of 0", whole._replace(group_size=0)),
        "groups of 24": ("groups of 24", whole._replace(group_size=24)),
        "units of two": ("units of 2 ", whole._replace(high=whole.high.view(-1, 2, 2, 32))),
        "five bits": ("of 5 bits", whole._replace(bits=5)),
        "planes of another type": ("planes .* torch.int8", whole._replace(high=whole.high.view(torch.int8))),
        "flat planes": ("planes ", whole._replace(high=whole.high.flatten(1))),
        "narrow planes": ("planes ", whole._replace(high=whole.high[..., :16])),
        "every other tile": ("planes ", whole._replace(high=wide[:, ::2])),
        "units in one place": ("planes ", whole._replace(high=whole.high[:1].expand_as(whole.high))),
        "no second plane": ("no second plane", whole._replace(low=None)),
        "a second plane": ("a second plane", four._replace(low=low)),
        "a second plane of two bits": ("a second plane", whole._replace(low=low[..., :16].contiguous())),
        "a short second plane": ("a second plane", whole._replace(low=low[:1])),
        "a second plane of another type": ("a second plane .* torch.int8", whole._replace(low=low.view(torch.int8))),
        "a second plane apart": ("a second plane", whole._replace(low=wide[:, :2])),
        "steps of floats": ("steps of torch.float32", whole._replace(steps=floats)),
        "steps without those of blocks": ("without those of blocks", whole._replace(block_steps=None)),
        "steps with those of blocks": ("with those of blocks", whole._replace(steps=floats.half())),
        "few steps": (r"steps \[9, 128\]", whole._replace(steps=steps[:9])),
        "narrow steps": (r"steps \[10, 64\]", whole._replace(steps=steps[:, :64])),
        "steps lying across": ("steps .* strides of", whole._replace(steps=steps.T.contiguous().T)),
        "offsets of another type": ("offsets of torch.int8", whole._replace(offsets=offsets.view(torch.int8))),
        "offsets without those of blocks": ("without those", whole._replace(block_offsets=None)),
        "offsets with those of blocks": ("with those", whole._replace(offsets=floats.half())),
        "those of blocks without offsets": ("offsets of nothing", whole._replace(offsets=None)),
        "offsets apart": ("offsets .* strides of", whole._replace(offsets=offsets.repeat(1, 2)[:, :128])),
        "blocks of another type": ("block_steps of", whole._replace(block_steps=torch.ones(2, 128))),
        "few blocks": (r"block_steps \[1, 128\]", whole._replace(block_steps=torch.ones(1, 128).half())),
        "zeros of another type": ("zeros of torch.int64", four._replace(zeros=zeros.long())),
        "few zeros": (r"zeros \[3, 128\]", four._replace(zeros=zeros[:3])),
        "offsets and zeros": ("both", four._replace(offsets=torch.ones(10, 128).half())),
        "elsewhere": ("elsewhere than on the cpu", whole._replace(steps=steps.to("meta"))),
    }


@pytest.mark.parametrize("name", malformed() if native.is_available() else ())
def test_a_matrix_that_is_none_is_refused(name: str) -> None:
    message, stored = malformed()[name]
    with pytest.raises(ValueError, match=message):
        native_matrix(stored)


def test_codes_lie_in_planes_where_kernels_look_for_them() -> None:
    """An output's bits are in a byte [eighth, quarter, place] of a tile, beside those of four channels."""
    codes = draw_whole(0, 256, 70, 9, seed=3).to(torch.uint8)
    high, low = planes.pack(codes, 8, 8)
    assert low is not None
    assert high.shape == low.shape == (2, 2, 8, 32)
    pairs = planes.pack(codes >> 2, 6, 8)[1]
    assert pairs is not None
    assert pairs.shape == (2, 2, 8, 16)
    runs_high, runs_low = planes.pack(codes >> 2, 6, 1)
    assert runs_low is not None
    assert runs_high.shape == (9, 2, 1, 32)
    for output, channel in ((0, 0), (1, 0), (4, 1), (8, 2), (31, 3), (32, 4), (37, 5), (63, 7), (64, 8), (69, 6)):
        code = int(codes[output, channel])
        tile, at, unit, within = output // 64, output % 64, channel // 8, channel % 8
        half, eighth, quarter, place = at // 32, at % 32 // 8, at % 8 // 4, at % 4
        quad, lane = within // 4, within % 4
        byte = 4 * (8 * eighth + 4 * quarter + place) + lane
        assert high[unit, tile].flatten()[128 * quad + byte] >> 4 * half & 15 == code >> 4
        assert low[unit, tile].flatten()[128 * quad + byte] >> 4 * half & 15 == code & 15
        byte = 4 * (4 * eighth + place) + lane
        assert pairs[unit, tile].flatten()[64 * quad + byte] >> 2 * half + 4 * quarter & 3 == code >> 2 & 3
        assert runs_high[channel, tile, 0, 16 * quarter + 4 * eighth + place] >> 4 * half & 15 == code >> 4
        assert runs_low[channel, tile, 0, 4 * eighth + place] >> 2 * half + 4 * quarter & 3 == code >> 2 & 3


@pytest.mark.parametrize("unit", planes.UNITS)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_packing_loses_nothing(bits: int, unit: int) -> None:
    for shape in ((1, 1), (64, 32), (130, 37), (5000, 3)):
        codes = draw_whole(0, 2**bits, *shape).to(torch.uint8)
        high, low = planes.pack(codes, bits, unit)
        assert torch.equal(planes.unpack(high, low, *shape), codes)
        some = torch.randint(0, shape[0], (7,), generator=torch.Generator().manual_seed(0))
        assert torch.equal(planes.unpack_rows(high, low, some, shape[1]), codes[some])


def test_units_are_a_page_of_each_plane() -> None:
    sizes = {(8192, 8): 1, (8191, 4): 1, (8128, 8): 4, (16384, 6): 1, (8192, 6): 4, (512, 8): 16, (1, 8): 32}
    assert {given: planes.unit_of(*given) for given in sizes} == sizes


def test_gradients_are_those_of_pytorch() -> None:
    linear, x = module(70, 100), draw(3, 70).requires_grad_()
    linear(x, kernels="native").sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, linear.dequantize().sum(0).expand(3, 70), atol=1e-3, rtol=1e-5)


def test_rows_need_not_be_contiguous() -> None:
    linear, x, bits = module(70, 100), draw(3, 140)[:, ::2], draw_bits(70, 3).T
    y = product(linear, x, bits)
    assert torch.equal(y, product(linear, x.contiguous(), bits.contiguous()))
    assert torch.equal(product(linear, x, bits[:, 0]), product(linear, x, bits[:, 0].contiguous()))


def test_inference_mode_is_no_obstacle() -> None:
    with torch.inference_mode():
        linear, x = module(70, 100), draw(3, 70)
        lay_out([linear], LargePages())
        assert_close(linear(x, kernels="native"), linear, x, 8)


def check(linear: AnyPrecisionLinear) -> None:
    x, bits = draw(3, linear.num_inputs), draw_bits(3, linear.num_inputs)
    assert_close(linear(x, bits, kernels="native"), linear, x, bits)


def test_what_is_multiplied_is_what_the_tensors_hold_now() -> None:
    linear, other = module(70, 100), module(70, 100, seed=9)
    check(linear)
    first = linear.matrix
    check(linear)
    assert linear.matrix is first
    linear.load_state_dict(other.state_dict())  # in place
    check(linear)
    assert torch.equal(linear.dequantize(), other.dequantize())
    linear.load_state_dict(module(70, 100, seed=10).state_dict(), assign=True)
    check(linear)
    assert linear.matrix is not first
    linear.high = torch.zeros_like(linear.high)
    check(linear)
    linear.get_buffer("steps")[1] = 17
    check(linear)
    linear.to(torch.float64).to(torch.float32)
    check(linear)
    lay_out([linear], LargePages())
    check(linear)


@pytest.mark.parametrize("laid_out", [False, True])
def test_copies_multiply_as_the_original(laid_out: bool) -> None:
    linear, x = module(70, 100), draw(3, 70)
    if laid_out:
        lay_out([linear], LargePages())
    y = linear(x, kernels="native")  # the matrix is made now
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)), copy.copy(linear)):
        assert torch.equal(other(x, kernels="native"), y)
    other = copy.deepcopy(linear)
    other.high.zero_()
    check(other)
    assert torch.equal(linear(x, kernels="native"), y)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_says_what_tensors_do_not(assign: bool) -> None:
    """The code of zero, and by what scales are multiplied."""
    linear, x = module(70, 100, form="zero"), draw(3, 70)
    check(linear)
    scales = Scales(linear.codes.scales.steps, 3, factor=0.25)
    other = AnyPrecisionLinear(GroupedCodes(linear.codes.codes, 8, 32, scales), None)
    linear.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(linear.dequantize(), other.dequantize())
    assert torch.equal(linear(x, kernels="native"), other(x, kernels="native"))


@pytest.mark.parametrize("bits", CODE_BITS)
def test_a_view_of_a_matrix_is_a_matrix(bits: int) -> None:
    linear, x = module(300, 300, bits, form="two levels", unit=8), draw(3, 300)
    high, low, *scales = linear.stored[:7]
    y = product(linear, x)

    def of_outputs(tensor: Tensor | None, of_tile: int) -> Tensor | None:
        return None if tensor is None else tensor[:, of_tile : 4 * of_tile]

    tiles = [of_outputs(high, 1), of_outputs(low, 1), *(of_outputs(each, 64) for each in scales)]
    some = StoredMatrix(*tiles, *linear.stored[7:])._replace(num_outputs=190)  # type: ignore[arg-type]
    assert torch.equal(product(some, x), y[:, 64:254])
    rows = [8, 8, 2, 2, 2, 1, 1]
    first = [None if t is None else t[:count] for t, count in zip(linear.stored[:7], rows, strict=True)]
    some = StoredMatrix(*first, *linear.stored[7:])._replace(num_inputs=64)  # type: ignore[arg-type]
    read = torch.full(x.shape, 8, dtype=torch.uint8).masked_fill(torch.arange(300) >= 64, 0)
    assert_close(product(some, x[:, :64]), linear, x, read)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_matrices_side_by_side_give_the_same_bits_as_alone(bits: int, form: str) -> None:
    for widths, unit in (((130, 60, 1), 1), ((64, 64), 8), ((65, 200, 70), 32)):
        maps = [module(300, width, bits, form=form, unit=unit, seed=i) for i, width in enumerate(widths)]
        x, read = draw(3, 300), draw_bits(3, 300)
        alone = [[products(each, x, chosen) for each in maps] for chosen in (8, read)]
        pages = LargePages()
        joined = lay_out(maps, pages)
        assert joined is not None
        for chosen, wanted in zip((8, read), alone, strict=True):
            whole, first = products(joined, x, chosen), 0
            for each, y in zip(maps, wanted, strict=True):
                assert torch.equal(whole[:, first : first + y.shape[1]], y)
                assert torch.equal(products(each, x, chosen), y)  # its part, where it lies now
                first += planes.padded(y.shape[1])
        before = [each.high.data_ptr() for each in maps]
        assert lay_out(maps, pages) is not None
        assert [each.high.data_ptr() for each in maps] == before  # what lies so already is left there
        assert lay_out(maps[:2], pages) is not None
        assert [each.high.data_ptr() for each in maps] == before


def test_matrices_of_two_forms_are_not_joined() -> None:
    pages, base = LargePages(), module(70, 100)
    for other in (
        module(70, 100, 4),
        module(70, 100, group_size=64),
        module(70, 100, form="zero"),
        module(70, 100, unit=4),
        module(69, 100),
    ):
        assert lay_out([base, other], pages) is None
        check(base)
        check(other)


def test_a_lone_matrix_in_large_pages_gives_the_same_bits() -> None:
    linear, x = module(70, 300), draw(3, 70)
    y = product(linear, x)
    assert lay_out([linear], LargePages()) is None
    assert linear.is_laid_out
    assert torch.equal(linear(x, kernels="native"), y)


def test_the_kernels_take_rows_in_float32_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, calls = module(70, 100), []
    run = any_precision_linear.multiply
    monkeypatch.setattr("quicksilver.weights.linear.multiply", lambda *args: calls.append(1) or run(*args))

    def uses_kernels(x: Tensor, kernels: native.Kernels = "native") -> bool:
        calls.clear()
        y = linear(x, 4, kernels=kernels)
        assert y.shape == (*x.shape[:-1], 100)
        assert y.dtype == x.dtype
        if calls:
            assert_close(y.view(-1, 100), linear, x.reshape(-1, 70), 4)
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


def test_bias_is_added_once() -> None:
    linear, x = module(70, 100), draw(4, 70)
    bits = torch.tensor([8, 0, 2, 4], dtype=torch.uint8)
    y = product(linear, x, bits)
    linear.bias = torch.nn.Parameter(draw(100, seed=8), requires_grad=False)
    assert torch.equal(linear(x, bits, kernels="native"), y + linear.bias)
    assert torch.equal(linear(x, 0, kernels="native"), linear(x, 0))


def test_threads_of_python_do_not_disturb_one_another() -> None:
    linears = [module(90, 300, seed=seed) for seed in range(4)]
    rows = [(draw(4, 90, seed=seed), draw_bits(4, 90, seed=seed)) for seed in range(4)]
    alone = [linear(x, bits, kernels="native") for linear, (x, bits) in zip(linears, rows, strict=True)]

    def again(i: int) -> bool:
        torch.set_num_threads(1 + i % 2)
        return torch.equal(linears[i](*rows[i], kernels="native"), alone[i])

    with threads(1), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(again, [i % 4 for i in range(200)]))


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


def test_nothing_past_an_operand_is_touched() -> None:
    command = [sys.executable, "-m", "tests.ops.guarded"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr)
