"""Stored tensors: read back as they were, or refused by name whatever was done to the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quicksilver.errors import ModelError
from quicksilver.weights.storage import INDEX, SINGLE, Expected, StoredTensors, give_back, write_tensors

TENSORS = {
    "layer.zeros": torch.arange(60, dtype=torch.uint8).view(20, 3),
    "layer.constants": torch.tensor([7, -1], dtype=torch.int32),
    "norm.weight": torch.tensor([1.5, -2.0, 0.25]).bfloat16(),
    "scale": torch.tensor(3.0),
    "wide": torch.arange(5.0)[:, None].expand(5, 2),
}
SHARD_2 = "model-00002-of-00003.safetensors"


def expected(**changes: Expected) -> dict[str, Expected]:
    return {name: Expected(tuple(t.shape), (t.dtype,)) for name, t in TENSORS.items()} | changes


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One file that holds all tensors."""
    write_tensors(TENSORS, tmp_path)
    return tmp_path / SINGLE


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with three shards and their index."""
    write_tensors(TENSORS, tmp_path, max_shard_size=20)
    return tmp_path


def refused(folder: Path, *names: str, wanted: dict[str, Expected] | None = None) -> None:
    with pytest.raises(ModelError) as caught:
        StoredTensors(folder).read_all(expected() if wanted is None else wanted)
    assert str(folder) in str(caught.value)
    assert all(name in str(caught.value) for name in names), caught.value


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("max_shard_size", ["2GB", 20, 1])
def test_tensors_come_back_as_they_were(tmp_path: Path, max_shard_size: int | str) -> None:
    write_tensors(TENSORS, tmp_path, max_shard_size)
    read = StoredTensors(tmp_path).read_all(expected())
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_files_are_named_as_hugging_face_names_them(single: Path, tmp_path: Path) -> None:
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    folder = tmp_path / "sharded"
    folder.mkdir()
    write_tensors(TENSORS, folder, max_shard_size=20)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in folder.iterdir()) == [*files, INDEX]
    index = json.loads((folder / INDEX).read_text())
    assert {name: file for file in files for name in load_file(folder / file)} == index["weight_map"]


def test_a_flipped_bit_anywhere_in_the_header_is_refused(tmp_path: Path) -> None:
    tensors = {name: TENSORS[name] for name in ("norm.weight", "scale")}
    write_tensors(tensors, tmp_path)
    path, wanted = tmp_path / SINGLE, {name: expected()[name] for name in tensors}
    good = path.read_bytes()
    for offset in range(header_size(path)):
        flip(path, offset, offset * 5 % 8)
        refused(tmp_path, SINGLE, wanted=wanted)
        path.write_bytes(good)
    assert StoredTensors(tmp_path).read_all(wanted).keys() == tensors.keys()


def test_a_flipped_bit_of_the_data_is_refused_and_its_tensor_named(single: Path) -> None:
    good = single.read_bytes()
    places = json.loads(good[8 : header_size(single)])
    for name in TENSORS:
        start, end = places[name]["data_offsets"]
        for offset in (start, end - 1):
            flip(single, header_size(single) + offset, 6)
            refused(single.parent, SINGLE, name)
            single.write_bytes(good)


def test_a_file_cut_off_anywhere_is_refused(single: Path) -> None:
    good = single.read_bytes()
    for size in range(0, len(good), 7):
        single.write_bytes(good[:size])
        refused(single.parent, SINGLE)
    single.write_bytes(good + b"\0")
    refused(single.parent, SINGLE)


def test_a_missing_shard_or_index_is_named(shards: Path) -> None:
    (shards / SHARD_2).unlink()
    refused(shards, SHARD_2, "missing")
    (shards / INDEX).unlink()
    refused(shards, INDEX)


def test_a_shard_in_anothers_place_is_named(shards: Path) -> None:
    (shards / SHARD_2).write_bytes((shards / SHARD_2.replace("2-", "1-")).read_bytes())
    refused(shards, SHARD_2, "index")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}', "\0"])
def test_a_malformed_index_is_named(shards: Path, content: str) -> None:
    (shards / INDEX).write_text(content)
    refused(shards, INDEX)


def test_an_index_cannot_lead_out_of_its_folder(shards: Path) -> None:
    index = {"weight_map": dict.fromkeys(TENSORS, "../model.safetensors")}
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, INDEX, "outside")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda wanted: wanted | {"extra": Expected((1,), (torch.uint8,))}, ("'extra'", "missing")),
        (lambda wanted: {n: e for n, e in wanted.items() if n != "scale"}, ("'scale'", "unexpected")),
        (lambda wanted: wanted | {"scale": Expected((1,), (torch.float32,))}, ("'scale'", "shape [], not [1]")),
        (lambda wanted: wanted | {"scale": Expected((), (torch.bfloat16,))}, ("'scale'", "float32, not bfloat16")),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    single: Path, shards: Path, change: Callable[[Any], Any], names: tuple[str, ...]
) -> None:
    refused(single.parent, *names, wanted=change(expected()))
    single.unlink()
    refused(shards, *names, wanted=change(expected()))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "crc32": "{}"}])
def test_a_file_without_its_checksums_is_refused(single: Path, metadata: dict[str, str] | None) -> None:
    save_file(load_file(single), single, metadata)
    refused(single.parent, SINGLE, "header", "checksum")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not say what is in memory")
def test_a_mapped_tensor_gives_its_memory_back_and_stays_what_it_is(tmp_path: Path) -> None:
    """And nothing happens to a tensor that is in memory alone."""

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) * 1024

    tensor = torch.arange(2**22, dtype=torch.int32)
    write_tensors({"large": tensor}, tmp_path)
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        mapped = file.get_tensor("large")
    part = mapped[3:-5]  # begins and ends within a page
    assert torch.equal(mapped, tensor)
    before = resident()
    give_back(part)
    assert before - resident() > 0.9 * tensor.nbytes
    assert torch.equal(mapped, tensor)
    mine = tensor.clone()
    give_back(mine)
    assert torch.equal(mine, tensor)
    give_back(tensor[:0])
