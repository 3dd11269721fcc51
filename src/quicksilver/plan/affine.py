"""Fitted affine maps: what a plan's tensors do once a model runs under it. Reading them is `tensors.py`'s business."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quicksilver.errors import PlanError


class AffineMap:
    """A fitted affine map, full or low rank: `x @ weight + bias`, or `x @ down @ up + bias`."""

    def __init__(self, weights: tuple[Tensor, ...], bias: Tensor) -> None:
        self.weights = weights  # one matrix [in, out], or two [in, rank] and [rank, out]
        self.bias = bias  # [out]

    @classmethod
    def named(cls, tensors: Mapping[str, Tensor], name: str, size: int) -> AffineMap:
        """Return the map from size to size that `name.weight`, or `name.down` and `name.up`, and `name.bias` hold.

        Raises:
            PlanError: one is missing, or of another shape.
        """
        weights = [f"{name}.weight"] if f"{name}.weight" in tensors else [f"{name}.down", f"{name}.up"]
        for key in (*weights, f"{name}.bias"):
            if key not in tensors:
                raise PlanError(f"the plan's tensor {key} is missing")
        found, bias = tuple(tensors[key] for key in weights), tensors[f"{name}.bias"]
        shapes = [tuple(t.shape) for t in found]
        rank = found[0].shape[-1] if found[0].dim() else 0
        wanted = [(size, size)] if len(found) == 1 else [(size, rank), (rank, size)]
        if shapes != wanted or tuple(bias.shape) != (size,):
            raise PlanError(f"the plan's map {name} has shapes {shapes}, the model needs {wanted[0][0]} to {size}")
        return cls(found, bias)

    @property
    def macs(self) -> int:
        """Multiply-adds for one row."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.weights, self.bias))

    def to(self, device: torch.device, dtype: torch.dtype) -> AffineMap:
        """Return the map on a device, for rows of a dtype: in that, or in float32 for float16, too narrow for sums."""
        dtype = torch.float32 if dtype == torch.float16 else dtype
        return AffineMap(tuple(w.to(device, dtype) for w in self.weights), self.bias.to(device, dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to rows [N, in]; return [N, out] in their dtype."""
        between = x.to(self.bias.dtype)
        for weight in self.weights[:-1]:
            between = between @ weight
        return torch.addmm(self.bias, between, self.weights[-1]).to(x.dtype)
