"""Tensors on disk: safetensors shards in which every tensor has a checksum, read back whole or refused by name."""

from __future__ import annotations

import ctypes
import json
import mmap
import zlib
from collections.abc import Collection, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from quicksilver.errors import ModelError, first_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_SIZE = "2GB"

_PATTERN = "model{suffix}.safetensors"
_UNWRITTEN = "-" * 8  # as long as a checksum
_CHECKSUMS = "crc32"  # key of a shard's metadata: JSON, the CRC-32 of each tensor's bytes
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class Expected(NamedTuple):
    """What a stored tensor must be."""

    shape: tuple[int, ...]  # its size along each dimension
    dtypes: tuple[torch.dtype, ...]  # any one of these


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Write tensors to `model.safetensors`, or to numbered shards and their index, as Hugging Face names them.

    No two tensors share memory; one that is larger than `max_shard_size`, bytes or "2GB", has a shard of its own.

    Raises:
        OSError: a file cannot be written.
    """
    with TensorWriter(tensors, folder, max_shard_size) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


class TensorWriter:
    """Writes tensors one by one and in any order; files can be read after the `with` alone.

    Of the tensors given first, shapes and dtypes count, so that they may be on "meta".
    """

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards

        split = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern=_PATTERN, max_shard_size=max_shard_size
        )
        self._index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
        self._folder, self._file_of = folder, split.tensor_to_filename
        self._shards = {
            file: _Shard(folder / file, {name: tensors[name] for name in names})
            for file, names in split.filename_to_tensors.items()
        }

    def __enter__(self) -> Self:
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, once; OSError where a file cannot be written."""
        self._shards[self._file_of[name]].write(name, tensor)

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            for shard in self._shards.values():
                shard.finish()
        if kind is None and self._index is not None:
            index = json.dumps(self._index, indent=2, sort_keys=True) + "\n"
            (self._folder / INDEX).write_text(index, encoding="utf-8")


class _Shard:
    """One file of tensors: where each lies, and its checksum once it is written."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that all are aligned
        ends = list(accumulate(tensors[name].nbytes for name in order))
        self._entries = {
            name: {"dtype": _DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": place}
            for name, place in zip(order, map(list, zip([0, *ends], ends, strict=False)), strict=True)
        }
        self._checksums = dict.fromkeys(order, _UNWRITTEN)
        self._path, self._begin = path, len(self._header())  # checksums have one length
        path.touch()

    def _header(self) -> bytes:
        metadata = {"format": "pt", _CHECKSUMS: json.dumps(self._checksums, sort_keys=True)}
        header = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header

    def write(self, name: str, tensor: Tensor) -> None:
        content = _bytes_of(tensor.detach().cpu())
        self._checksums[name] = _checksum(content)
        self._write_at(self._begin + self._entries[name]["data_offsets"][0], content)

    def finish(self) -> None:
        assert _UNWRITTEN not in self._checksums.values()
        self._write_at(0, self._header())

    def _write_at(self, place: int, content: bytes | memoryview) -> None:
        with self._path.open("r+b") as file:
            file.seek(place)
            file.write(content)


class StoredTensors:
    """Tensors of a folder's safetensors by name, read when they are asked for.

    Args:
        folder: holds one file, or several and their index.
        checked: files are those that `write_tensors` wrote: every tensor has a checksum, and is read whole or not.

    Raises:
        ModelError: a file is missing or damaged, or its tensors are not those that the index or the checksums name.
    """

    def __init__(self, folder: Path, checked: bool = True) -> None:
        self._folder, self._checked = folder, checked
        self._held: dict[str, tuple[Path, Any, str]] = {}
        shards = list_shards(folder)
        for file, names in shards.items():
            shard, checksums = _open_shard(folder / file, names, checked)
            self._held |= {name: (folder / file, shard, checksum) for name, checksum in checksums.items()}
        self.names = frozenset(self._held)
        self._files = ", ".join(shards)

    def describe(self, name: str) -> str:
        """Return how messages name a tensor: with its file, or the folder where it is missing."""
        path = self._held[name][0] if name in self._held else self._folder
        return f"{path}: tensor {name!r}"

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, which is not read."""
        return tuple(self._held[name][1].get_slice(name).get_shape())

    def read(self, name: str, expected: Expected | None = None) -> Tensor:
        """Return a tensor, on the CPU; ModelError where it is missing, damaged, or not what is expected."""
        if name not in self._held:
            raise ModelError(f"{self.describe(name)} is missing from {self._files}")
        _, shard, checksum = self._held[name]
        tensor = shard.get_tensor(name)
        if expected is not None and tuple(tensor.shape) != expected.shape:
            raise ModelError(f"{self.describe(name)} has shape {list(tensor.shape)}, not {list(expected.shape)}")
        if expected is not None and tensor.dtype not in expected.dtypes:
            dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected.dtypes)
            raise ModelError(f"{self.describe(name)} is {str(tensor.dtype).removeprefix('torch.')}, not {dtypes}")
        if self._checked and _checksum(_bytes_of(tensor)) != checksum:
            raise ModelError(f"{self.describe(name)} is damaged: its checksum does not match")
        return tensor

    def check_names(self, expected: Collection[str]) -> None:
        """Raise ModelError where a tensor is not among those expected."""
        for name in sorted(self.names.difference(expected)):
            raise ModelError(f"{self.describe(name)} is unexpected")

    def read_all(self, expected: Mapping[str, Expected]) -> dict[str, Tensor]:
        """Return what is expected; ModelError as `read` has it, or where there is anything else."""
        self.check_names(expected)
        return {name: self.read(name, wanted) for name, wanted in expected.items()}


def list_shards(folder: Path) -> dict[str, set[str] | None]:
    """Return the files to read, and which tensors the index says each holds (None without an index)."""
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    path = folder / INDEX
    if not path.is_file():
        raise ModelError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str] | None] = {file: set() for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            shards[file].add(name)  # type: ignore[union-attr]
        strays = [file for file in shards if Path(file).name != file]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not an index of weight files: {error!r}") from None
    if strays or not shards:
        raise ModelError(f"{path}: names {'a file outside of the folder' if strays else 'no file'}")
    return shards


def _open_shard(path: Path, names: set[str] | None, checked: bool) -> tuple[Any, dict[str, str]]:
    """Return a file, and the checksums of its tensors, empty where they are not `checked`."""
    from safetensors import SafetensorError, safe_open

    try:
        shard = safe_open(path, framework="pt")
        held = set(shard.keys())
        checksums = _read_checksums(path, shard.metadata(), held) if checked else dict.fromkeys(held, "")
    except FileNotFoundError:
        raise ModelError(f"{path}: this weight file is missing") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: the weight file is damaged or cut off: {first_line(error)}") from None
    for name in sorted(held ^ (held if names is None else names)):
        place = "its index does not" if name in held else "it does not, but its index does"
        raise ModelError(f"{path}: tensor {name!r}: {place} name it")
    return shard, checksums


def _read_checksums(path: Path, metadata: Mapping[str, str] | None, held: set[str]) -> dict[str, str]:
    try:
        if metadata is None or set(metadata) != {"format", _CHECKSUMS} or metadata["format"] != "pt":
            raise ValueError("no checksums; another program may have written it")
        checksums = json.loads(metadata[_CHECKSUMS])
        if not isinstance(checksums, dict):
            raise ValueError("its checksums are no object")
        if odd := sorted(set(checksums) ^ held):
            there = "is in the file and has no checksum" if odd[0] in held else "has a checksum and is not in the file"
            raise ValueError(f"tensor {odd[0]!r} {there}; another program may have written it")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the header is damaged: {error}") from None
    return checksums


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(content: memoryview) -> str:
    """Return the CRC-32 of bytes, eight hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


def give_back(tensor: Tensor) -> None:
    """Give back the memory of a tensor that is a view of a file; its pages are read again when they are asked for.

    So a model that is read tensor by tensor is never in memory as a whole; what was made of earlier ones, and freed, is
    given back too. Where this system does not say that the tensor lies in a file, nothing is done. Nobody may have
    written to the tensor: that would be lost.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and tensor.is_cpu and _is_of_file(first):
        system = ctypes.CDLL(None)
        system.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
        if hasattr(system, "malloc_trim"):
            system.malloc_trim(ctypes.c_size_t(0))  # between small things that stay, holes of this size would grow


def _is_of_file(address: int) -> bool:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # no Linux
        return False
    for line in lines:
        place, _, _, _, inode, *_ = line.split()
        begin, end = (int(bound, 16) for bound in place.split("-"))
        if begin <= address < end:
            return inode != "0"
    return False
