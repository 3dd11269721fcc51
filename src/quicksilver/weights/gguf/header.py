"""The head of a GGUF file: metadata and a list of tensors, no length of which is believed before it is checked.

What tensors hold, `blocks.py` says. The package `gguf` reads heads too, one object a number: a vocabulary takes it a
minute, and an array that says it is endless takes it for ever.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from quicksilver.errors import UnsupportedModelError
from quicksilver.weights.gguf.types import TYPES, UNSUPPORTED

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_UINT32, _FLOAT32, _STRING, _ARRAY = 4, 6, 8, 9
_ALIGNMENT = "general.alignment"
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is within a file and what it is."""

    type_name: str  # a key of TYPES
    shape: tuple[int, ...]  # slowest first: [out, in] of a matrix
    offset: int  # from the file's beginning, in bytes
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """Metadata by key and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def parse_header(data: np.ndarray) -> Header:
    """Read the head of a file's bytes [n] uint8.

    Raises:
        ValueError: this is no GGUF file, or a damaged one; the message says where.
        UnsupportedModelError: its byte order, its version or a tensor's type is not supported.
    """
    cursor = _Cursor(data.data)
    _check_version(cursor)
    num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
    types, metadata = {}, {}
    for _ in range(num_keys):
        key = cursor.string("the name of a key")
        if key in metadata:
            raise ValueError(f"the key {key!r} is there twice")
        types[key] = cursor.scalar("I")
        metadata[key] = cursor.value(types[key], key)
    infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(num_tensors):
        name = cursor.string("the name of a tensor")
        if name in infos:
            raise ValueError(f"the tensor {name!r} is there twice")
        infos[name] = cursor.tensor_info(name)
    alignment = metadata.get(_ALIGNMENT, 32)
    if types.get(_ALIGNMENT, _UINT32) != _UINT32 or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{_ALIGNMENT} is {alignment!r}, not a power of two in 32 bits")
    return Header(metadata, _place(infos, cursor.position, alignment, len(data)))


def _check_version(cursor: _Cursor) -> None:
    if bytes(cursor.take(4, "the file's mark")) != _MAGIC:
        raise ValueError("not a GGUF file")
    version = cursor.scalar("I")
    if version and not version & 0xFFFF:
        raise UnsupportedModelError("the file is in the other byte order (big-endian), which is not supported")
    if version not in _VERSIONS:
        raise UnsupportedModelError(f"version {version} of GGUF is not supported; 2 and 3 are")


def _place(
    infos: dict[str, tuple[int, tuple[int, ...], int]], position: int, alignment: int, num_bytes: int
) -> dict[str, TensorInfo]:
    """Return tensors by name; their data follow one another, each from a multiple of the alignment on."""
    start = _aligned(position, alignment)
    due, tensors = 0, {}
    for name, (number, shape, offset) in infos.items():
        type_name = UNSUPPORTED.get(number, f"number {number}")
        kind = next((each for each in TYPES.values() if each.number == number), None)
        if kind is None:
            known = ", ".join(TYPES)
            raise UnsupportedModelError(f"{name}: tensors of type {type_name} are not supported; supported: {known}")
        if not shape or len(shape) > _MAX_DIMENSIONS or min(shape) < 1 or shape[-1] % kind.block:
            raise ValueError(f"{name}: a tensor of type {kind.name} cannot have the shape {list(shape)}")
        if offset != due:
            raise ValueError(f"{name}: its data are at {offset}, and not at {due}, where the tensor before it ends")
        size = math.prod(shape) // kind.block * kind.num_bytes
        if start + offset + size > num_bytes:
            raise ValueError(f"{name}: its data end at byte {start + offset + size}, and the file at {num_bytes}")
        tensors[name] = TensorInfo(kind.name, shape, start + offset, size)
        due = _aligned(offset + size, alignment)
    return tensors


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


class _Cursor:
    """Reads values one after the other; ValueError where the data end before they do."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.position = 0

    def take(self, size: int, what: str) -> memoryview:
        begin, end = self.position, self.position + size
        if end > len(self._data):
            raise ValueError(f"{what} would end at byte {end}, and the file ends at {len(self._data)}: it is cut off")
        self.position = end
        return self._data[begin:end]

    def scalar(self, code: str, what: str = "the head") -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        size = self.scalar("Q", what)
        try:
            return str(self.take(size, what), "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise ValueError(f"{key} has a type of number {kind}, which is unknown")
        value = self.scalar(_SCALARS[kind], key)
        return float(str(np.float32(value))) if kind == _FLOAT32 else value  # 1e-05 and not 9.999999747378752e-06

    def _array(self, key: str) -> list[Any]:
        kind, count = self.scalar("I", key), self.scalar("Q", key)
        if kind == _STRING:
            return [self.string(key) for _ in range(count)]  # each takes eight bytes or more: it ends
        if kind not in _SCALARS:
            raise ValueError(f"{key} is a list of a type of number {kind}, which is not supported")
        dtype = np.dtype("<" + _SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, key), dtype).tolist()

    def tensor_info(self, name: str) -> tuple[int, tuple[int, ...], int]:
        """Return a tensor's type, shape and offset."""
        rank = self.scalar("I", name)
        if rank > _MAX_DIMENSIONS:
            raise ValueError(f"{name}: a tensor of {rank} dimensions, where {_MAX_DIMENSIONS} are the most")
        shape = struct.unpack(f"<{rank}Q", self.take(8 * rank, name))
        return self.scalar("I", name), tuple(reversed(shape)), self.scalar("Q", name)
