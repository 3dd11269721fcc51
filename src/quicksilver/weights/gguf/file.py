"""A GGUF file, or the files of a set, opened: metadata at once, tensors when they are asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quicksilver.core.checks import is_whole
from quicksilver.core.sources import find_gguf
from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.weights.codes import GroupedCodes
from quicksilver.weights.gguf.blocks import decode
from quicksilver.weights.gguf.header import Header, TensorInfo, parse_header
from quicksilver.weights.gguf.types import TYPES

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufFile:
    """What a file holds, or a set of files of which any is named; data are mapped, and read when they are needed.

    Args:
        path: a file, or a folder with one file or one set.

    Raises:
        ModelError: it cannot be opened, or is damaged; a file of the set is missing or is another's.
        UnsupportedModelError: its byte order, its version or a tensor's type is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        named = find_gguf(path) if os.path.isdir(path) else Path(path)
        data, header = _open(named)
        self.path = named
        self._parts = [(named, data, header)]
        count = header.metadata.get("split.count", 1)
        if not is_whole(count):
            raise ModelError(f"{named}: split.count is {count!r}, not a number of files")
        if count != 1:
            self._parts = [_open_shard(path, i, count) for i, path in enumerate(_shards(named, count))]
            self.path = self._parts[0][0]
        self.metadata: dict[str, Any] = self._parts[0][2].metadata
        self._places: dict[str, tuple[Path, np.ndarray, TensorInfo]] = {}
        for shard, data, header in self._parts:
            for name, info in header.tensors.items():
                if name in self._places:
                    raise ModelError(f"{shard}: {name} is in {self._places[name][0].name} too")
                self._places[name] = (shard, data, info)
        total = self.metadata.get("split.tensors.count", len(self._places))
        if total != len(self._places):
            raise ModelError(f"{self.path}: the set holds {len(self._places)} tensors, and should hold {total}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors by name, [out, in] of a matrix."""
        return {name: info.shape for name, (_, _, info) in self._places.items()}

    @property
    def types(self) -> dict[str, str]:
        """Types of tensors by name, "Q4_K" for one."""
        return {name: info.type_name for name, (_, _, info) in self._places.items()}

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is not of floats."""
        return any(TYPES[name].is_quantized for name in self.types.values())

    def read(self, name: str) -> Tensor | GroupedCodes:
        """Return a tensor: floats in the file's own type and, where they can be, its memory; or a matrix in codes.

        Raises:
            ModelError: there is no such tensor, floats or scales are NaN or infinite, or codes are no matrix.
        """
        if name not in self._places:
            raise ModelError(f"{self.path}: there is no tensor {name}")
        shard, data, info = self._places[name]
        raw = torch.from_numpy(data[info.offset : info.offset + info.num_bytes])
        if info.type_name in _FLOATS:
            dtype = _FLOATS[info.type_name]
            raw = raw.clone() if info.offset % dtype.itemsize else raw
            made = raw.view(dtype).view(info.shape)
            floats = [made]
        elif len(info.shape) != 2:
            raise ModelError(f"{shard}: {name} is quantized, and no matrix: its shape is {list(info.shape)}")
        else:
            made = decode(info.type_name, raw.view(info.shape[0], -1, TYPES[info.type_name].num_bytes))
            floats = [value for value in vars(made.scales).values() if isinstance(value, Tensor)]
        for value in floats:
            if value.is_floating_point() and not bool(value.isfinite().all()):
                what = "weights" if value is made else "scales"
                raise ModelError(f"{shard}: {name} holds {what} that are NaN or infinite")
        return made


def _open(path: Path) -> tuple[np.ndarray, Header]:
    with _naming(path):
        if not os.path.getsize(path):
            raise ValueError("the file is empty")
        data = np.memmap(path, np.uint8, "c")  # what is written to it would not reach the file
        return data, parse_header(data)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name a file in what goes wrong with it."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None


def _shards(named: Path, count: int) -> list[Path]:
    """Return the files of a set, one of which is named; ModelError where its name does not say how they are called."""
    match = _SHARD.fullmatch(named.name)
    if match is None or int(match[3]) != count or not 1 <= int(match[2]) <= count:
        raise ModelError(
            f"{named}: one of {count} files, whose names must end as they did when they were made:"
            f" -00001-of-{count:05}.gguf and so on"
        )
    return [named.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]


def _open_shard(path: Path, index: int, count: int) -> tuple[Path, np.ndarray, Header]:
    data, header = _open(path)
    found = header.metadata.get("split.no"), header.metadata.get("split.count")
    if found != (index, count):
        raise ModelError(
            f"{path}: its name says file {index + 1} of {count}, and it says split.no, split.count {found}"
        )
    return path, data, header
