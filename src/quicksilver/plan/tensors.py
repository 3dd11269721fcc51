"""What calibration fitted to a model: named tensors that belong to a plan, as a value with a digest.

How they are fitted is `quicksilver.calibrate`'s business; what they do, the runtime's. Reading and checking a plan's
file takes no PyTorch: values are bytes until a tensor is asked for.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, deserialize

from quicksilver.core.files import write_atomically
from quicksilver.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor


class _Values(NamedTuple):
    """A tensor's shape and its float32 values, as they lie in memory."""

    shape: tuple[int, ...]
    data: bytearray


class PlanTensors(Mapping[str, "Tensor"]):
    """Named float32 tensors on the CPU, compared by their contents.

    Args:
        tensors: by name; copied to the CPU as float32.

    Raises:
        PlanError: a value that is not finite.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        ready = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
        self._hold({name: _Values(tuple(t.shape), bytearray(t.numpy().tobytes())) for name, t in ready.items()})

    def _hold(self, values: Mapping[str, _Values]) -> None:
        self._values = {name: values[name] for name in sorted(values)}
        for name, (_, data) in self._values.items():
            if not math.isfinite(sum(array("f", data))):  # a float64 holds the sum of any float32 there are
                raise PlanError(f"fitted tensor {name} holds NaN or infinite values")

    @classmethod
    def load(cls, path: Path) -> PlanTensors:
        """Read a safetensors file.

        Raises:
            PlanError: it is missing, unreadable or damaged.
        """
        try:
            data = path.read_bytes()
            stored = dict(deserialize(data))
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan's tensors: {error.strerror or error}") from None
        except SafetensorError as error:
            raise PlanError(f"{path}: not a safetensors file: {error}") from None
        if any(each["dtype"] != "F32" for each in stored.values()):
            from safetensors.torch import load

            return cls(load(data))
        tensors = cls({})
        tensors._hold({name: _Values(tuple(each["shape"]), each["data"]) for name, each in stored.items()})
        return tensors

    def save(self, path: Path) -> None:
        """Write a safetensors file; an interrupted write leaves nothing half-written."""
        from safetensors.torch import save

        write_atomically(path, save(dict(self)))

    @cached_property
    def digest(self) -> str:
        """First 16 hexadecimal digits of SHA-256 over names, shapes and values."""
        total = hashlib.sha256()
        for name, (shape, data) in self._values.items():
            total.update(f"{name} {shape}\n".encode())
            total.update(data)
        return total.hexdigest()[:16]

    def select(self, prefixes: tuple[str, ...]) -> PlanTensors:
        """Return the tensors whose names begin with one of the prefixes."""
        return PlanTensors({name: tensor for name, tensor in self.items() if name.startswith(prefixes)})

    def __getitem__(self, name: str) -> Tensor:
        import torch

        shape, data = self._values[name]
        return torch.frombuffer(data, dtype=torch.float32).reshape(shape) if data else torch.empty(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

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
