"""What calibration fitted to a model: named tensors that belong to a plan, as a value with a digest.

How they are fitted is `quicksilver.calibrate`'s business; what they do, the runtime's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from quicksilver.core.files import write_atomically
from quicksilver.errors import PlanError


class PlanTensors(Mapping[str, Tensor]):
    """Named float32 tensors on the CPU, compared by their contents.

    Args:
        tensors: by name; copied to the CPU as float32.

    Raises:
        PlanError: a value that is not finite.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensors[name].detach().float().cpu().contiguous() for name in sorted(tensors)}
        for name, tensor in self._tensors.items():
            if not bool(tensor.isfinite().all()):
                raise PlanError(f"fitted tensor {name} holds NaN or infinite values")

    @classmethod
    def load(cls, path: Path) -> PlanTensors:
        """Read a safetensors file.

        Raises:
            PlanError: it is missing, unreadable or damaged.
        """
        try:
            return cls(load_file(path))
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan's tensors: {error.strerror or error}") from None
        except SafetensorError as error:
            raise PlanError(f"{path}: not a safetensors file: {error}") from None

    def save(self, path: Path) -> None:
        """Write a safetensors file; an interrupted write leaves nothing half-written."""
        write_atomically(path, save(self._tensors))

    @cached_property
    def digest(self) -> str:
        """First 16 hexadecimal digits of SHA-256 over names, shapes and values."""
        total = hashlib.sha256()
        for name, tensor in self._tensors.items():
            total.update(f"{name} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.numpy().tobytes())
        return total.hexdigest()[:16]

    def select(self, prefixes: tuple[str, ...]) -> PlanTensors:
        """Return the tensors whose names begin with one of the prefixes."""
        return PlanTensors({name: tensor for name, tensor in self.items() if name.startswith(prefixes)})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanTensors) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def named_vector(tensors: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    """Return the tensor `name`, a vector of so many values: a gate, or the mean of a map's inputs.

    Raises:
        PlanError: it is missing, or of another shape.
    """
    if name not in tensors:
        raise PlanError(f"the plan's tensor {name} is missing")
    if tuple(tensors[name].shape) != (size,):
        raise PlanError(f"the plan's tensor {name} has shape {tuple(tensors[name].shape)}, the model needs ({size},)")
    return tensors[name]


class AffineMap:
    """A fitted affine map, full or low rank: `x @ weight + bias`, or `x @ down @ up + bias`.

    Args:
        weights: one matrix [in, out], or two [in, rank] and [rank, out].
        bias: [out].
    """

    def __init__(self, weights: tuple[Tensor, ...], bias: Tensor) -> None:
        self.weights = weights
        self.bias = bias

    @classmethod
    def named(cls, tensors: Mapping[str, Tensor], name: str, size: int) -> AffineMap:
        """Return the map that tensors `name.weight`, or `name.down` and `name.up`, and `name.bias` hold.

        Args:
            tensors: of a plan.
            name: of the map.
            size: of its input and of its output.

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
