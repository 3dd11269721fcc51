"""What calibration fitted to a model: named tensors that belong to a plan, as a value with a digest.

How they are fitted is `quicksilver.calibrate`'s business; what they do, the runtime's. Reading and checking a plan's
file takes no PyTorch: values are bytes until a tensor is asked for.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, deserialize

from quicksilver.core.files import write_atomically
from quicksilver.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor


Array = float | tuple[float, ...] | tuple["Array", ...]
"""Numbers, or lists of them, as a plan's parts hold them."""

_DTYPES = {"F32": "f", "F64": "d"}


class _Values(NamedTuple):
    """A tensor's shape, its values as they lie in memory, and their type, an `array.typecode`."""

    shape: tuple[int, ...]
    data: bytearray
    code: str = "f"

    def numbers(self) -> array[float]:
        """Return the values."""
        return array(self.code, self.data)


class PlanTensors(Mapping[str, "Tensor"]):
    """Named float32 tensors on the CPU, compared by their contents; in files float64 arrays are among them.

    Tensors are copied; PlanError names one that holds a value that is not finite.
    """

    def __init__(self, tensors: Mapping[str, Tensor | _Values]) -> None:
        self._values = {
            name: each if isinstance(each, _Values) else _values(each.detach().float().cpu().contiguous())
            for name, each in sorted(tensors.items())
        }
        for name, values in self._values.items():
            if not math.isfinite(sum(values.numbers())):  # a float64 holds the sum of any float32 there are
                raise PlanError(f"fitted tensor {name} holds NaN or infinite values")

    @classmethod
    def load(cls, path: Path) -> PlanTensors:
        """Read a safetensors file, float64 as it is; PlanError where it is missing, unreadable or damaged."""
        try:
            data = path.read_bytes()
            stored = dict(deserialize(data))
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan's tensors: {error.strerror or error}") from None
        except SafetensorError as error:
            raise PlanError(f"{path}: not a safetensors file: {error}") from None
        if any(each["dtype"] not in _DTYPES for each in stored.values()):
            from safetensors.torch import load

            return cls(load(data))
        return cls({name: _Values(tuple(t["shape"]), t["data"], _DTYPES[t["dtype"]]) for name, t in stored.items()})

    def save(self, path: Path) -> None:
        """Write a safetensors file; an interrupted write leaves nothing half-written."""
        from safetensors.torch import save

        write_atomically(path, save(dict(self)))

    def with_arrays(self, arrays: Mapping[str, Array]) -> PlanTensors:
        """Return these and some arrays, each number of which is kept exactly."""
        data = {name: bytearray(array("d", _flat(each)).tobytes()) for name, each in arrays.items()}
        made = {name: _Values(_shape(arrays[name]), each, "d") for name, each in data.items()}
        return PlanTensors({**self._values, **made})

    def narrowed(self, arrays: Collection[str]) -> PlanTensors:
        """Return these with all but the arrays in float32, as fitted tensors are."""
        kept = {name: each for name, each in self._values.items() if each.code == "f" or name in arrays}
        others = {name: each for name, each in self._values.items() if name not in kept}
        made = {n: _Values(each.shape, bytearray(array("f", each.numbers()).tobytes())) for n, each in others.items()}
        return PlanTensors({**kept, **made})

    def without(self, names: Collection[str]) -> PlanTensors:
        """Return the others."""
        return PlanTensors({name: each for name, each in self._values.items() if name not in names})

    def array(self, name: str) -> Array:
        """Return the numbers of a tensor, in a tuple for each of its dimensions."""
        shape, numbers = self._values[name].shape, tuple(self._values[name].numbers())
        for size in reversed(shape[1:]):
            numbers = tuple(numbers[i : i + size] for i in range(0, len(numbers), max(size, 1)))
        return numbers

    @cached_property
    def digest(self) -> str:
        """First 16 hexadecimal digits of SHA-256 over names, shapes and values."""
        total = hashlib.sha256()
        for name, each in self._values.items():
            total.update(f"{name} {each.shape}\n".encode())
            total.update(each.data)
        return total.hexdigest()[:16]

    def __getitem__(self, name: str) -> Tensor:
        import torch

        each, dtype = self._values[name], {"f": torch.float32, "d": torch.float64}
        values = torch.frombuffer(each.data, dtype=dtype[each.code]) if each.data else torch.empty(0)
        return values.reshape(each.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanTensors) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def _values(tensor: Tensor) -> _Values:
    return _Values(tuple(tensor.shape), bytearray(tensor.numpy().tobytes()))


def _shape(value: Array) -> tuple[int, ...]:
    return (len(value), *_shape(value[0])) if isinstance(value, tuple) else ()


def _flat(value: Array) -> Iterator[float]:
    if isinstance(value, tuple):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def named_vector(tensors: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    """Return the tensor `name`, a gate or the mean of a map's inputs; PlanError where it is no vector of that size."""
    if name not in tensors:
        raise PlanError(f"the plan's tensor {name} is missing")
    if tuple(tensors[name].shape) != (size,):
        raise PlanError(f"the plan's tensor {name} has shape {tuple(tensors[name].shape)}, the model needs ({size},)")
    return tensors[name]
