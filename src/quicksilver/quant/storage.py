"""Tensors on disk: safetensors shards in which every tensor has a checksum, read back whole or refused by name.

What the tensors mean is the caller's business.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quicksilver.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_SIZE = "2GB"

_PATTERN = "model{suffix}.safetensors"
_CHECKSUMS = "crc32"  # key of a shard's metadata: JSON, the CRC-32 of each tensor's bytes


class Expected(NamedTuple):
    """What a stored tensor must be.

    Attributes:
        shape: its size along each dimension.
        dtypes: any one of these.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Write tensors to `model.safetensors`, or to numbered shards and their index, as Hugging Face names them.

    Args:
        tensors: no two of them share memory.
        folder: an existing folder.
        max_shard_size: bytes, or a number with a unit ("2GB"); a larger tensor has a shard of its own.

    Raises:
        OSError: a file cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        checksums = {name: _checksum(tensor) for name, tensor in shard.items()}
        try:
            save_file(shard, folder / file, {"format": "pt", _CHECKSUMS: json.dumps(checksums, sort_keys=True)})
        except SafetensorError as error:
            raise OSError(str(error)) from None
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tensors(folder: Path, expected: Mapping[str, Expected]) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote, on the CPU; every byte is checked.

    Args:
        folder: holds the shards.
        expected: the tensors there must be, no more and no fewer.

    Raises:
        ModelError: a file is missing or damaged, or a tensor is missing, unexpected, damaged, or of another shape
            or dtype; the message names it.
    """
    tensors: dict[str, Tensor] = {}
    shards = list_shards(folder)
    for file, names in shards.items():
        tensors |= _read_shard(folder / file, names, expected)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ModelError(f"{folder}: tensor {missing[0]!r} is missing from {', '.join(shards)}")
    return tensors


def list_shards(folder: Path) -> dict[str, set[str] | None]:
    """Return the files to read, and the tensors that the index says each holds (None without an index).

    Raises:
        ModelError: there is neither a single file nor an index, or the index is damaged.
    """
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


def _read_shard(path: Path, names: set[str] | None, expected: Mapping[str, Expected]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as shard:
            held = set(shard.keys())
            checksums = _read_checksums(path, shard.metadata(), held)
            for name in sorted(held ^ (held if names is None else names)):
                place = "its index does not" if name in held else "it does not, but its index does"
                raise ModelError(f"{path}: tensor {name!r}: {place} name it")
            return {name: _read_tensor(path, shard, name, checksums[name], expected) for name in sorted(held)}
    except FileNotFoundError:
        raise ModelError(f"{path}: this weight file is missing") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: the weight file is damaged or cut off: {error}") from None


def _read_checksums(path: Path, metadata: Mapping[str, str] | None, held: set[str]) -> dict[str, str]:
    try:
        if metadata is None or set(metadata) != {"format", _CHECKSUMS} or metadata["format"] != "pt":
            raise ValueError("no checksums; another program may have written it")
        checksums = json.loads(metadata[_CHECKSUMS])
        if not isinstance(checksums, dict) or set(checksums) != held:
            raise ValueError("its checksums are of other tensors")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the header is damaged: {error}") from None
    return checksums


def _read_tensor(path: Path, shard: Any, name: str, checksum: str, expected: Mapping[str, Expected]) -> Tensor:
    if name not in expected:
        raise ModelError(f"{path}: tensor {name!r} is unexpected")
    tensor, wanted = shard.get_tensor(name), expected[name]
    if tuple(tensor.shape) != wanted.shape:
        raise ModelError(f"{path}: tensor {name!r} has shape {list(tensor.shape)}, not {list(wanted.shape)}")
    if tensor.dtype not in wanted.dtypes:
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted.dtypes)
        raise ModelError(f"{path}: tensor {name!r} is {str(tensor.dtype).removeprefix('torch.')}, not {dtypes}")
    if _checksum(tensor) != checksum:
        raise ModelError(f"{path}: tensor {name!r} is damaged: its checksum does not match")
    return tensor


def _checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a contiguous tensor's bytes on the CPU, eight hexadecimal digits."""
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"
