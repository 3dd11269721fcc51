"""Whether the compiled kernels read a model's weights: what was asked for, what is possible; and the head's way."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.errors import KernelsMissingWarning, KernelsUnavailableError
from quicksilver.families.family import Family, declared_in
from quicksilver.families.modules import defined_in, is_observed
from quicksilver.families.names import FAMILIES
from quicksilver.families.spec import ModelSpec
from quicksilver.ops import native
from quicksilver.ops.any_precision_linear import NormOperands, accepts, multiply
from quicksilver.ops.native import KernelChoice, Kernels
from quicksilver.weights import AnyPrecisionLinear

_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
}
"""Classes of PyTorch and transformers by name, and what the kernels call them."""


def resolve(choice: KernelChoice, spec: ModelSpec) -> Kernels:
    """Return which kernels read a model's any-precision weights; "auto" uses the compiled ones map by map if it can.

    Where it cannot, KernelsMissingWarning says so once for each reason; where another choice cannot be had,
    KernelsUnavailableError.
    """
    choice = native.check_choice(choice)
    if choice == "torch" or not spec.is_quantized:
        if choice == "native":
            native.extension()
        return "torch"
    problem = native.why_unavailable() or _unfit(spec)
    if problem is not None and choice == "native":
        raise KernelsUnavailableError(f"native kernels cannot be used: {problem}")
    if problem is not None:
        _warn_once(problem)
    return "native" if problem is None else "torch"


def norm_operands(norm: object) -> NormOperands | None:
    """Return what the compiled kernels need of a norm, None where they do not know it."""
    found, made_in = None, defined_in(type(norm).forward) if isinstance(norm, nn.Module) else ""
    if made_in == "torch.nn.modules.normalization" and isinstance(norm, nn.LayerNorm):
        found = None if norm.bias is None else NormOperands(norm.weight, norm.bias, norm.eps)
    elif made_in.startswith("transformers.models.") and (family := _family_of_norm(norm, made_in)) is not None:
        found = _offset_operands(norm, family.norm_offset)
    tensors = [] if found is None else [found.weight, found.bias]
    fit = all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors)
    return found if fit else None


def _family_of_norm(norm: Any, made_in: str) -> Family | None:
    """Return the family that defines a norm by the root mean square, None where it is none or of no known family."""
    package, module = made_in.split(".")[-2:]
    known = package in FAMILIES.values() and module == f"modeling_{package}" and type(norm).__name__.endswith("RMSNorm")
    return declared_in(package) if known else None


def _offset_operands(norm: Any, offset: float) -> NormOperands | None:
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if epsilon is None:
        return None
    return NormOperands(norm.weight + offset if offset else norm.weight, None, epsilon)


def activation_name(module: nn.Module) -> str | None:
    """Return what the compiled kernels call an activation, None where they do not know it."""
    known = defined_in(type(module).forward) in ("torch.nn.modules.activation", "transformers.activations")
    return _ACTIVATIONS.get(type(module).__name__) if known else None


def head(module: AnyPrecisionLinear, hidden: Tensor, norm: nn.Module | None = None) -> Tensor:
    """Return logits [M, vocab] of states [M, d], normed first where a norm is given, by a quantized head.

    A decoded token's head is short beside PyTorch's dispatcher, so float32 rows on the CPU go to the compiled kernels
    by the shortest way. Where states, weights or the norm are not the kernels', where states or the norm want a
    gradient, where hooks are on either, and for more rows, both are called as modules.
    """
    operands = None if norm is None else norm_operands(norm)
    known = norm is None or (operands is not None and not _wants_gradient(operands) and not is_observed(norm))
    reads = known and accepts(hidden) and not module.is_expanded and not is_observed(module)
    if not reads:
        return module(hidden if norm is None else norm(hidden), kernels="native")
    logits = multiply(hidden, module.matrix, norm=operands)
    return logits if module.bias is None else logits + module.bias


def _wants_gradient(operands: NormOperands) -> bool:
    tensors = operands.weight, operands.bias
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _unfit(spec: ModelSpec) -> str | None:
    """Return why no activation of a model can be what the kernels multiply, None where it can."""
    if spec.device.type == "cpu" and spec.dtype == torch.float32:
        return None
    dtype = str(spec.dtype).removeprefix("torch.")
    return f"they read float32 on the CPU, and the model runs in {dtype} on {spec.device.type}"


@cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"PyTorch reads any-precision weights here, slowly: {problem}", KernelsMissingWarning, stacklevel=4)
