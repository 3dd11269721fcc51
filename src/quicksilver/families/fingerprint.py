"""Which model is it: a short digest of a model's shape and of a sample of its weights."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.families.quantize import HEAD
from quicksilver.families.spec import ModelSpec
from quicksilver.weights import AnyPrecisionLinear

_SAMPLES = 64
_FACTS = ("family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")


def fingerprint(model: nn.Module, spec: ModelSpec) -> str:
    """Return the first 16 hexadecimal digits of SHA-256 over a model's shape and a sample of its weights.

    Of every tensor 64 values, evenly spaced, are read, so that it costs milliseconds whatever the model's size.
    Quantized weights are sampled as the integers they are stored in, and the plain ones of a quantized model are passed
    over: the digest does not depend on the dtype it is loaded in. A plain model is sampled in bfloat16, so that
    bfloat16 and the float32 made of it are the same model; float16 may not be.
    """
    digest = hashlib.sha256(repr([getattr(spec, name) for name in _FACTS]).encode())
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(_sample(tensor).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return any-precision weights, or all parameters where none are."""
    quantized: list[tuple[str, Any]] = [
        (f"{path}.{name}", buffer)
        for path, module in model.named_modules()
        if isinstance(module, AnyPrecisionLinear) and path != HEAD
        for name, buffer in module.named_buffers()
    ]
    return sorted(quantized or [(name, p.detach()) for name, p in model.named_parameters()], key=lambda pair: pair[0])


def _sample(tensor: Tensor) -> Tensor:
    """Return up to `_SAMPLES` values of a tensor, as integers on the CPU."""
    count = min(_SAMPLES, tensor.numel())
    places = torch.arange(count, device=tensor.device) * tensor.numel() // max(count, 1)
    values = tensor.take(places).cpu()
    return values.bfloat16().view(torch.int16) if values.is_floating_point() else values
