"""What all keys of a layer have in common because their projection has a bias; taking it out is the backends' business.

Qwen2.5's first layers have key biases of over a hundred in a few dimensions. Codes of 8 bits, scaled to these, would
tell little else of a key. A vector taken from all keys of a head changes all scores of a query alike, and so no weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quicksilver.families.spec import Adapter, LayerOps

_POSITIONS = 4096  # over which a rotated bias is averaged
_LARGE = 16.0  # smaller components are no larger than keys are, and stay


def key_centres(adapter: Adapter) -> tuple[Tensor | None, ...]:
    """Return for each layer what its rotated keys have in common, [num_kv_heads, head_dim], None where it is little.

    It is the mean of the rotated bias over positions: all of it in dimensions that rotate slowly, where models keep
    large biases, and next to nothing in the others. Norms of keys leave no bias; under caps of scores weights change.
    """
    return tuple(_centre(adapter, layer) for layer in adapter.layers)


def _centre(adapter: Adapter, layer: LayerOps) -> Tensor | None:
    if layer.spec.softcap is not None or "key" in layer.norms:
        return None
    with torch.no_grad():
        nothing = torch.zeros((1, adapter.spec.hidden_size), dtype=adapter.spec.dtype, device=adapter.spec.device)
        try:
            (bias,) = layer.project(1, 2, nothing, _bias)
        except _NoBiasError:
            return None
        if layer.spec.rotary is not None:
            positions = torch.arange(min(_POSITIONS, adapter.spec.max_positions), device=bias.device)
            bias = adapter.rotations[layer.spec.rotary](positions).apply(bias.expand(len(positions), -1, -1))
        mean = bias.float().mean(0)
        centre = mean.masked_fill(mean.abs() < _LARGE, 0.0)
    return centre.contiguous() if bool(centre.any()) and bool(centre.isfinite().all()) else None


class _NoBiasError(Exception):
    """A map has no bias."""


def _bias(module: Any, x: Tensor) -> Tensor:
    """Stand in for a map of zeros: nothing is multiplied, and nothing is packed for kernels."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        raise _NoBiasError
    return bias.to(x.device, x.dtype).expand(x.shape[0], -1)
