"""Operators of a decoder layer's parts by the compiled kernels: norm, rotary, attention over entries, MLP.

They are what a span of layers is made of, one by one: `norm`, `rotary`, `attention` and `mlp` of
`torch.ops.quicksilver`, registered when this module is imported. All are pure functions of float32 tensors on the CPU,
and have no gradients: a backward pass through one raises RuntimeError.
The products of an MLP are `nested_linear.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quicksilver.ops import native
from quicksilver.ops.nested_linear import NormOperands, StoredMatrix, check_rows, multiply, readable, refuse_gradients

ACTIVATIONS = ("silu", "gelu_tanh")
"""Activations of MLPs that the kernels know; the second is GELU by the hyperbolic tangent."""

_LIBRARY = torch.library.Library("quicksilver", "FRAGMENT")
_SCHEMAS = (
    "norm(Tensor x, Tensor weight, Tensor? bias, float epsilon) -> Tensor",
    "rotary(Tensor heads, Tensor cos, Tensor sin) -> Tensor",
    "attention(Tensor queries, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor? masses,"
    " Tensor starts, Tensor counts, float scaling) -> Tensor",
    "mlp(Tensor x, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor? up_bias, Tensor? down_bias, int group_size,"
    " int inner, int num_outputs, int uniform, str activation) -> Tensor",
)
_KEPT = {torch.float32: 32, torch.bfloat16: 16, torch.int8: 8}  # bits of a number of keys and values


def norm(x: Tensor, operands: NormOperands) -> Tensor:
    """Norm rows: LayerNorm, or by the root mean square where there is no bias.

    Args:
        x: [N, d] float32 on the CPU.
        operands: of the norm: weight and bias [d] float32, and the epsilon.

    Returns:
        [N, d] float32.

    Raises:
        KernelsUnavailableError: there are no kernels.
        ValueError: shapes or types that do not fit.
    """
    return torch.ops.quicksilver.norm.default(x, *operands)


def rotary(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their positions: x cos + rotate_half(x) sin, where rotate_half pairs halves, as Llama's does.

    Args:
        heads: [N, H, D] float32 on the CPU, D even.
        cos: [N, D] float32, of each row's position.
        sin: likewise.

    Returns:
        [N, H, D] float32; `heads` stay as they are.

    Raises:
        KernelsUnavailableError: there are no kernels.
        ValueError: shapes or types that do not fit.
    """
    return torch.ops.quicksilver.rotary.default(heads, cos, sin)


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    counts: Tensor,
    scaling: float,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    masses: Tensor | None = None,
) -> Tensor:
    """Attend from a few queries, each over its own run of entries: softmax(q k * scaling + log mass) v.

    Args:
        queries: [N, H, D] float32.
        keys: [E, Hkv, D] entries of all sequences, float32, bfloat16 or int8 codes; H is a multiple of Hkv.
        values: like keys.
        starts: [N] int64, each query's first entry.
        counts: [N] int64, how many entries it sees, at least one.
        scaling: of the scores.
        scales: of keys and of values, each [E, Hkv] float32, where they are codes.
        masses: [E] int32, tokens that each entry stands for; None where each stands for one.

    Returns:
        [N, H, D] float32.

    Raises:
        KernelsUnavailableError: there are no kernels.
        ValueError: shapes or types that do not fit, or a run outside the entries.
    """
    key_scales, value_scales = (None, None) if scales is None else scales
    run = torch.ops.quicksilver.attention.default
    return run(queries, keys, values, key_scales, value_scales, masses, starts, counts, scaling)


def mlp(
    x: Tensor,
    up: StoredMatrix,
    down: StoredMatrix,
    activation: str,
    *,
    gate: StoredMatrix | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    width: int = 8,
) -> Tensor:
    """Return activation(x gate) * (x up) down, or activation(x up + bias) down + bias where there is no gate.

    Args:
        x: [N, in] float32.
        up: [in, inner].
        down: [inner, out].
        activation: one of `ACTIVATIONS`.
        gate: like `up`.
        biases: of `up` and of `down`.
        width: bits to read of all weights.

    Returns:
        [N, out] float32.

    Raises:
        KernelsUnavailableError: there are no kernels.
        ValueError: shapes, types or groups that do not fit, no such activation, or a matrix that is not readable.
    """
    sized = [(stored.group_size, stored.num_outputs) for stored in (up if gate is None else gate, up)]
    if sized[0] != sized[1] or down.group_size != up.group_size:
        raise ValueError("the gate must have as many outputs as `up`, and all matrices groups of one size")
    tensors = [[] if stored is None else [*stored.planes, *stored[1:4]] for stored in (gate, up, down)]
    sizes = up.group_size, up.num_outputs, down.num_outputs
    return torch.ops.quicksilver.mlp.default(x, *tensors, *biases, *sizes, width, activation)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    _check("x", x, (None, None))
    _check("weight", weight, (x.shape[1],))
    if bias is not None:
        _check("bias", bias, (x.shape[1],))
    rows, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    operands = NormOperands(weight.contiguous(), None if bias is None else bias.contiguous(), epsilon)
    native.extension().norm_rows(rows.data_ptr(), y.data_ptr(), *rows.shape, *operands.addresses)
    return y


def _rotary(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check("heads", heads, (None, None, None))
    num_rows, _, size = heads.shape
    if size % 2:
        raise ValueError(f"heads must have an even size to be rotated, got {size}")
    _check("cos", cos, (num_rows, size))
    _check("sin", sin, (num_rows, size))
    rotated, cos, sin = heads.clone(memory_format=torch.contiguous_format), cos.contiguous(), sin.contiguous()
    native.extension().rotate_rows(rotated.data_ptr(), *rotated.shape, cos.data_ptr(), sin.data_ptr())
    return rotated


def _attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    masses: Tensor | None,
    starts: Tensor,
    counts: Tensor,
    scaling: float,
) -> Tensor:
    _check("queries", queries, (None, None, None))
    num_rows, num_heads, size = queries.shape
    if keys.dtype not in _KEPT or keys.dim() != 3 or keys.shape[1] == 0 or num_heads % keys.shape[1]:
        raise ValueError(
            f"keys must be [E, heads that divide {num_heads}, {size}] float32, bfloat16 or int8, got"
            f" {list(keys.shape)} {keys.dtype}"
        )
    num_entries, num_kv_heads = keys.shape[:2]
    _check("keys", keys, (num_entries, num_kv_heads, size), keys.dtype)
    _check("values", values, tuple(keys.shape), keys.dtype)
    coded = keys.dtype == torch.int8
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if (scales is not None) != coded:
            raise ValueError(f"{name} must be given where keys and values are codes, and nowhere else")
        if scales is not None:
            _check(name, scales, (num_entries, num_kv_heads))
    if masses is not None:
        _check("masses", masses, (num_entries,), torch.int32)
    _check("starts", starts, (num_rows,), torch.int64)
    _check("counts", counts, (num_rows,), torch.int64)
    if bool(((starts < 0) | (counts < 1) | (starts > num_entries - counts)).any()):
        raise ValueError(f"a query's run of entries is empty or not within the {num_entries} that there are")
    asked, out = queries.clone(memory_format=torch.contiguous_format), queries.new_empty(queries.shape)
    kept = [None if t is None else t.contiguous() for t in (keys, values, key_scales, value_scales, masses)]
    native.extension().attend_rows(
        asked.data_ptr(),
        out.data_ptr(),
        (num_rows, num_heads, num_kv_heads, size),
        _KEPT[keys.dtype],
        [0 if t is None else t.data_ptr() for t in kept],
        starts.tolist(),
        counts.tolist(),
        scaling,
        torch.get_num_threads(),
    )
    return out


def _mlp(
    x: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    group_size: int,
    inner: int,
    num_outputs: int,
    uniform: int,
    activation: str,
) -> Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    up_states = _product(x, up, group_size, inner, uniform, up_bias)
    gated = _product(x, gate, group_size, inner, uniform, None) if gate else up_states
    native.extension().activate(activation, gated.data_ptr(), up_states.data_ptr() if gate else 0, gated.numel())
    return _product(gated, down, group_size, num_outputs, uniform, down_bias)


def _product(
    x: Tensor, tensors: Sequence[Tensor], group_size: int, num_outputs: int, width: int, bias: Tensor | None
) -> Tensor:
    """Return rows times a matrix in nested codes, given as the operator gets it, plus a bias."""
    *planes, exponents, zeros, constants = tensors
    stored = StoredMatrix(planes, exponents, zeros, constants, group_size, num_outputs)
    matrix = readable(stored)
    check_rows(x, stored, None, width)
    y = multiply(x, matrix, uniform=width)
    if bias is None:
        return y
    _check("a bias", bias, (num_outputs,))
    return y.add_(bias)


def _check(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype = torch.float32) -> None:
    """Raise ValueError where a tensor has another shape (None: any size) or type."""
    fits = tensor.dim() == len(shape) and all(
        size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{wanted}] {dtype}, got {list(tensor.shape)} {tensor.dtype}")


def _like_first(first: Tensor, *rest: object) -> Tensor:
    return first.new_empty(first.shape)


def _mlp_fake(
    x: Tensor, gate: object, up: object, down: object, up_bias: object, down_bias: object, *rest: int
) -> Tensor:
    _, _, num_outputs, _, _ = rest
    return x.new_empty((x.shape[0], num_outputs))


for _schema, _run, _fake in zip(
    _SCHEMAS, (_norm, _rotary, _attention, _mlp), (_like_first, _like_first, _like_first, _mlp_fake), strict=True
):
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"quicksilver::{_name}", _fake, lib=_LIBRARY)
    refuse_gradients(_name, _LIBRARY)
