"""Operators of a layer's parts: their definitions in float64, on every instruction set; and as PyTorch sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.cache.coded import decode, encode
from quicksilver.ops import layer_parts, native
from quicksilver.ops.nested_linear import NormOperands
from tests import tolerances
from tests.ops.nested import INSTRUCTION_SETS, draw, expected, module, threads, using

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")
ISAS = pytest.mark.parametrize("isa", INSTRUCTION_SETS)
CLOSE = {"atol": tolerances.SUMS, "rtol": tolerances.SUMS}
KEPT = [torch.float32, torch.bfloat16, torch.int8]


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return heads * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def entries(count: int, heads: int, size: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return entries as they are kept, their scales, and what they mean."""
    exact = draw(count, heads, size, seed=seed)
    if dtype == torch.int8:
        codes, scales = encode(exact)
        return codes, scales, decode(codes, scales, torch.float64)
    return exact.to(dtype), None, exact.to(dtype).double()


def attended(
    queries: Tensor, keys: Tensor, values: Tensor, masses: Tensor | None, runs: list[tuple[int, int]], scaling: float
) -> Tensor:
    """Return the definition, [N, H, D] float64, query by query and head by head."""
    out, group = torch.zeros_like(queries, dtype=torch.float64), queries.shape[1] // keys.shape[1]
    for n, (start, count) in enumerate(runs):
        for h in range(queries.shape[1]):
            k, v = (t[start : start + count, h // group] for t in (keys, values))
            scores = k @ queries[n, h].double() * scaling
            if masses is not None:
                scores = scores + masses[start : start + count].double().log()
            out[n, h] = scores.softmax(0) @ v
    return out


@ISAS
@pytest.mark.parametrize("size", [1, 5, 16, 33, 768])
@pytest.mark.parametrize("rows", [1, 3])
def test_norms_are_layer_norm_and_by_the_root_mean_square(isa: str, rows: int, size: int) -> None:
    x, weight, bias = draw(rows, size) * 3 + 1, draw(size, seed=1), draw(size, seed=2)
    with using(isa):
        layer = layer_parts.norm(x, NormOperands(weight, bias, 1e-5))
        root = layer_parts.norm(x, NormOperands(weight, None, 1e-6))
    x, weight, bias = x.double(), weight.double(), bias.double()
    torch.testing.assert_close(layer.double(), F.layer_norm(x, (size,), weight, bias, 1e-5), **tolerances.LAYER_NORM)
    torch.testing.assert_close(root.double(), F.rms_norm(x, (size,), weight, 1e-6), **CLOSE)


@ISAS
@pytest.mark.parametrize("size", [2, 6, 64])
@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (3, 5)])
def test_rotary_pairs_halves(isa: str, rows: int, heads: int, size: int) -> None:
    x, cos, sin = draw(rows, heads, size), draw(rows, size, seed=1), draw(rows, size, seed=2)
    before = x.clone()
    with using(isa):
        y = layer_parts.rotary(x, cos, sin)
    torch.testing.assert_close(y.double(), rotated(x.double(), cos.double(), sin.double()), **CLOSE)
    assert torch.equal(x, before)


@ISAS
@pytest.mark.parametrize("dtype", KEPT, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 1), (4, 2, 5), (3, 3, 64), (8, 1, 72)])
@pytest.mark.parametrize("massive", [False, True])
def test_attention_over_ragged_entries(
    isa: str, dtype: torch.dtype, heads: int, kv_heads: int, size: int, massive: bool
) -> None:
    runs = [(0, 1), (1, 17), (18, 5), (0, 23)]
    queries = draw(len(runs), heads, size)
    keys, key_scales, k = entries(23, kv_heads, size, dtype, 1)
    values, value_scales, v = entries(23, kv_heads, size, dtype, 2)
    masses = torch.arange(1, 24, dtype=torch.int32) if massive else None
    starts, counts = torch.tensor(runs).unbind(1)
    scales = None if key_scales is None or value_scales is None else (key_scales, value_scales)
    with using(isa):
        y = layer_parts.attention(queries, keys, values, starts, counts, 0.3, scales=scales, masses=masses)
    torch.testing.assert_close(y.double(), attended(queries, k, v, masses, runs, 0.3), **CLOSE)


@ISAS
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", KEPT, ids=str)
@pytest.mark.parametrize("size", [5, 40, 72])
def test_threads_and_instruction_sets_change_no_bit(isa: str, count: int, dtype: torch.dtype, size: int) -> None:
    queries = draw(3, 4, size)
    keys, key_scales, _ = entries(23, 2, size, dtype, 1)
    values, value_scales, _ = entries(23, 2, size, dtype, 2)
    scales = None if key_scales is None or value_scales is None else (key_scales, value_scales)
    runs = torch.tensor([0, 2, 0]), torch.tensor([23, 17, 1])

    def attend(masses: Tensor | None) -> Tensor:
        return layer_parts.attention(queries, keys, values, *runs, 0.2, scales=scales, masses=masses)

    for masses in (None, torch.arange(1, 24, dtype=torch.int32)):
        with using(INSTRUCTION_SETS[-1]), threads(1):
            once = attend(masses)
        with using(isa), threads(count):
            assert torch.equal(attend(masses), once)


@ISAS
@pytest.mark.parametrize("dtype", KEPT, ids=str)
def test_every_output_is_written_and_nothing_else(isa: str, dtype: torch.dtype) -> None:
    """With the memory of outputs full of NaN, and of entries around a run too."""
    room, queries = torch.full((4, 2, 24), float("nan")), draw(2, 2, 24)
    keys, scales, _ = entries(8, 1, 24, dtype, 1)
    if scales is None:
        keys[:2] = keys[5:] = float("nan")
    else:
        scales[:2] = scales[5:] = float("nan")
    kept = [keys.data_ptr(), keys.data_ptr(), *[0 if scales is None else scales.data_ptr()] * 2, 0]
    bits = {torch.float32: 32, torch.bfloat16: 16, torch.int8: 8}[dtype]
    with using(isa):
        native.extension().attend_rows(
            queries.data_ptr(), room[1:3].data_ptr(), (2, 2, 1, 24), bits, kept, [2, 3], [3, 1], 0.5, 2
        )
        assert bool(room[1:3].isfinite().all() & room[0].isnan().all() & room[3].isnan().all())
        rows = torch.full((4, 19), float("nan"))
        x, weight = draw(2, 19), draw(19, seed=1)
        native.extension().norm_rows(x.data_ptr(), rows[1:3].data_ptr(), 2, 19, weight.data_ptr(), 0, 1e-5)
    assert bool(rows[1:3].isfinite().all() & rows[0].isnan().all() & rows[3].isnan().all())


@ISAS
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", layer_parts.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "inputs", "inner"), [(1, 40, 5), (3, 33, 70), (16, 64, 257)])
def test_mlps_gated_and_plain(isa: str, gated: bool, activation: str, rows: int, inputs: int, inner: int) -> None:
    x = draw(rows, inputs)
    gate, up, down = module(inputs, inner, seed=3, spread=0), module(inputs, inner, seed=4, spread=0), module(inner, 21)
    biases = (None, None) if gated else (draw(inner, seed=5), draw(21, seed=6))
    with using(isa):
        y = layer_parts.mlp(
            x, up.stored, down.stored, activation, gate=gate.stored if gated else None, biases=biases, width=6
        )
    up_states = expected(up, x, torch.full(x.shape, 6)) + (0.0 if biases[0] is None else biases[0].double())
    act = F.silu if activation == "silu" else lambda t: F.gelu(t, approximate="tanh")
    inside = act(expected(gate, x, torch.full(x.shape, 6))) * up_states if gated else act(up_states)
    wanted = inside @ down.codes.dequantize(6).double() + (0.0 if biases[1] is None else biases[1].double())
    rms = float((y.double() - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())
    assert rms < tolerances.MLP_RMS


def calls() -> dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]]:
    """Return each operator and arguments for it."""
    operators = torch.ops.quicksilver
    up, down = module(33, 70, seed=3).stored, module(70, 21, seed=4).stored
    flat = [[*stored.planes, *stored[1:4]] for stored in (up, down)]
    codes, scales = encode(draw(9, 2, 6))
    runs = torch.tensor([0, 3]), torch.tensor([4, 6])
    return {
        "norm": (operators.norm.default, (draw(2, 9), draw(9, seed=1), draw(9, seed=2), 1e-5)),
        "root mean square": (operators.norm.default, (draw(2, 9), draw(9, seed=1), None, 1e-5)),
        "rotary": (operators.rotary.default, (draw(2, 3, 8), draw(2, 8, seed=1), draw(2, 8, seed=2))),
        "attention": (
            operators.attention.default,
            (draw(2, 4, 6), draw(9, 2, 6), draw(9, 2, 6, seed=1), None, None, None, *runs, 0.4),
        ),
        "codes": (
            operators.attention.default,
            (draw(2, 4, 6), codes, codes, scales, scales, torch.ones(9, dtype=torch.int32), *runs, 0.4),
        ),
        "plain mlp": (operators.mlp.default, (draw(2, 33), [], *flat, draw(70), None, 32, 70, 21, 8, "gelu_tanh")),
        "gated mlp": (operators.mlp.default, (draw(2, 33), flat[0], *flat, None, None, 32, 70, 21, 4, "silu")),
    }


@pytest.mark.parametrize("name", calls() if native.is_available() else [])
def test_opcheck_accepts_them(name: str) -> None:
    operator, arguments = calls()[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", calls() if native.is_available() else [])
def test_compiled_they_give_the_same(name: str, backend: str) -> None:
    operator, (x, *rest) = calls()[name]

    def doubled(x: Tensor) -> Tensor:
        return 2 * operator(x, *rest)

    torch._dynamo.reset()  # every case compiles the one function anew
    compiled = torch.compile(doubled, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(x), doubled(x))


@pytest.mark.parametrize("name", calls() if native.is_available() else [])
def test_gradients_are_refused_and_not_cut(name: str) -> None:
    operator, (x, *rest) = calls()[name]
    y = operator(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match=f"{operator._opname} has no gradient"):
        y.sum().backward()
    with torch.no_grad():
        assert not operator(x, *rest).requires_grad


def test_rows_need_not_be_contiguous() -> None:
    x, weight = draw(3, 20)[:, ::2], draw(20, seed=1)[::2]
    plain = layer_parts.norm(x.contiguous(), NormOperands(weight.contiguous(), None, 1e-5))
    assert torch.equal(layer_parts.norm(x, NormOperands(weight, None, 1e-5)), plain)
    queries, keys = draw(2, 6, 4).transpose(1, 2), draw(2, 5, 6).transpose(0, 1)
    runs = torch.tensor([0, 1]), torch.tensor([5, 2])
    plain = layer_parts.attention(queries.contiguous(), keys.contiguous(), keys.contiguous(), *runs, 0.5)
    assert torch.equal(layer_parts.attention(queries, keys, keys, *runs, 0.5), plain)
    heads, cos = draw(2, 6, 4).transpose(1, 2), draw(6, 2).T
    plain = layer_parts.rotary(heads.contiguous(), cos.contiguous(), cos.contiguous())
    assert torch.equal(layer_parts.rotary(heads, cos, cos), plain)


def test_what_does_not_fit_is_refused() -> None:
    x, q, kv = draw(2, 9), draw(2, 4, 6), draw(9, 2, 6)
    starts, counts = torch.tensor([0, 3]), torch.tensor([4, 6])
    codes, scales = encode(kv)
    up, down = module(9, 70, seed=3).stored, module(70, 21, seed=4).stored
    attend = layer_parts.attention
    wrong: dict[str, Callable[[], Tensor]] = {
        r"x must be \[any, any\]": lambda: layer_parts.norm(x[0], NormOperands(draw(9), None, 1e-5)),
        r"x must be \[any, any\] torch.float32": lambda: layer_parts.norm(
            x.double(), NormOperands(draw(9), None, 1e-5)
        ),
        r"weight must be \[9\]": lambda: layer_parts.norm(x, NormOperands(draw(8), None, 1e-5)),
        r"bias must be \[9\]": lambda: layer_parts.norm(x, NormOperands(draw(9), draw(8), 1e-5)),
        "even size": lambda: layer_parts.rotary(draw(2, 3, 5), draw(2, 5), draw(2, 5)),
        r"cos must be \[2, 6\]": lambda: layer_parts.rotary(q, draw(2, 5), draw(2, 6)),
        "heads that divide 4": lambda: attend(q, draw(9, 3, 6), draw(9, 3, 6), starts, counts, 1.0),
        r"keys must be \[9, 2, 6\]": lambda: attend(q, draw(9, 2, 5), kv, starts, counts, 1.0),
        r"values must be \[9, 2, 6\]": lambda: attend(q, kv, kv.bfloat16(), starts, counts, 1.0),
        "key_scales must be given": lambda: attend(q, codes, codes, starts, counts, 1.0),
        "nowhere else": lambda: attend(q, kv, kv, starts, counts, 1.0, scales=(scales, scales)),
        "key_scales must be": lambda: attend(q, codes, codes, starts, counts, 1.0, scales=(scales[:8], scales)),
        "masses must be": lambda: attend(q, kv, kv, starts, counts, 1.0, masses=torch.ones(9)),
        "starts must be": lambda: attend(q, kv, kv, starts.int(), counts, 1.0),
        "not within the 9": lambda: attend(q, kv, kv, starts, counts + 1, 1.0),
        "within the 9 that": lambda: attend(
            q, kv, kv, torch.full_like(starts, 2**63 - 1), torch.ones_like(counts), 1.0
        ),
        "is empty": lambda: attend(q, kv, kv, starts, counts - 4, 1.0),
        "silu, gelu_tanh": lambda: layer_parts.mlp(x, up, down, "relu"),
        "rows must be": lambda: layer_parts.mlp(draw(2, 8), up, down, "silu"),
        r"a bias must be \[70\]": lambda: layer_parts.mlp(x, up, down, "silu", biases=(draw(69), None)),
        "groups of one size": lambda: layer_parts.mlp(x, up, module(70, 21, 64).stored, "silu"),
        "as many outputs": lambda: layer_parts.mlp(x, up, down, "silu", gate=module(9, 69).stored),
        "not 9": lambda: layer_parts.mlp(x, up, down, "silu", width=9),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
