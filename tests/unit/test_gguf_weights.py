"""GGUF files are opened whole or refused in a line, and their tensors are what ggml says of them, to the last bit."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quicksilver.errors import ModelError
from quicksilver.weights.codes import GroupedCodes
from quicksilver.weights.gguf.blocks import decode
from quicksilver.weights.gguf.file import GgufFile
from quicksilver.weights.gguf.types import TYPES, UNSUPPORTED
from tests import gguf_files
from tests.gguf_files import Types, random_blocks, write

QUANTIZED = tuple(name for name, kind in TYPES.items() if kind.is_quantized)
HALF_ONE = b"\x00\x3c"


def blocks_of(kind: str, data: np.ndarray) -> Tensor:
    return torch.from_numpy(data.reshape(data.shape[0], -1, TYPES[kind].num_bytes).copy())


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.int32)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_random_blocks_mean_what_ggml_says_to_the_last_bit(kind: str) -> None:
    data = random_blocks(kind, 24, 3)
    made = decode(kind, blocks_of(kind, data)).dequantize().numpy()
    expected = gguf.dequantize(data, Types[kind])
    assert np.array_equal(bits(made), bits(expected))
    assert len(np.unique(expected)) > 100


@pytest.mark.parametrize("kind", QUANTIZED)
def test_nothing_changes_where_the_thread_flushes_subnormal_numbers(kind: str) -> None:
    data = random_blocks(kind, 8, 2, seed=1)
    expected = gguf.dequantize(data, Types[kind])
    torch.set_flush_denormal(True)
    try:
        made = decode(kind, blocks_of(kind, data)).dequantize().numpy()
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(bits(made), bits(expected))


@pytest.mark.parametrize("scale", [b"\x01\x00", b"\x00\xbc", b"\x01\x80"], ids=["subnormal", "-1", "-subnormal"])
def test_scales_that_are_subnormal_or_negative_are_kept(scale: bytes) -> None:
    factor = float(np.frombuffer(scale, np.float16)[0])
    block = np.frombuffer(b"\x21" * 128 + b"\xe4" * 64 + bytes(range(1, 17)) + scale, np.uint8)[None]
    made = decode("Q6_K", blocks_of("Q6_K", block)).dequantize()
    assert made[0, 0] == factor * (1 - 32)
    assert torch.equal(made, torch.from_numpy(gguf.dequantize(block, Types.Q6_K)))


def test_elements_are_in_the_order_that_ggml_has_within_a_block() -> None:
    def values(kind: str, data: bytes, *places: int) -> list[float]:
        made = decode(kind, blocks_of(kind, np.frombuffer(data, np.uint8)[None])).dequantize()[0]
        return [float(made[place]) for place in places]

    assert values("Q4_0", HALF_ONE + b"\xf0" + b"\x88" * 15, 0, 1, 16, 17) == [-8, 0, 7, 0]
    assert values("Q4_1", HALF_ONE + b"\x00\xc2" + b"\xf1" + bytes(15), 0, 1, 16, 17) == [-2, -3, 12, -3]
    assert values("Q5_0", HALF_ONE + b"\x01\x00\x02\x00" + b"\x0f" + bytes(15), 0, 1, 16, 17) == [15, -16, -16, 0]
    scales = struct.pack("16b", -1, 2, *range(3, 17))
    q6_k = b"\x21" * 64 + bytes(64) + b"\xe4" * 32 + bytes(32) + scales + HALF_ONE
    assert values("Q6_K", q6_k, 0, 16, 32, 64, 96, 127, 128) == [31, -62, -45, 10, 126, 144, -288]


def test_the_twelve_bytes_of_scales_hold_eight_scales_and_eight_offsets() -> None:
    packed = bytes.fromhex("4182c304c5468708" + "21436587")
    for least, expected in ((HALF_ONE, [-4, -4, -4, -4, -33, 15, 15, -1]), (bytes(2), [1, 2, 3, 4, 17, 35, 53, 7])):
        block = np.frombuffer(HALF_ONE + least + packed + b"\x11" * 128, np.uint8)[None]
        assert decode("Q4_K", blocks_of("Q4_K", block)).dequantize()[0, ::32].tolist() == expected


def test_dimensions_are_fastest_first_and_data_are_not_transposed(tmp_path: Path) -> None:
    square, data = np.arange(16, dtype=np.float32).reshape(4, 4), random_blocks("Q4_1", 3, 18)
    path = write(tmp_path / "a.gguf", {}, {"a": (square, "F32"), "b": (data, "Q4_1")})
    file = GgufFile(path)
    assert file.shapes == {"a": (4, 4), "b": (3, 576)}
    made, codes = file.read("a"), file.read("b")
    assert isinstance(made, Tensor)
    assert torch.equal(made, torch.from_numpy(square))
    assert isinstance(codes, GroupedCodes)
    assert (codes.bits, codes.group_size, codes.codes.shape) == (4, 32, (3, 576))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_stay_in_their_own_type(tmp_path: Path, kind: str) -> None:
    values = torch.linspace(-2, 2, 24).view(3, 8)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    raw = values.to(dtype).contiguous()
    array = raw.view(torch.uint8).numpy() if kind == "BF16" else raw.numpy()
    file = GgufFile(write(tmp_path / "a.gguf", {}, {"a": (array, kind)}))
    made = file.read("a")
    assert isinstance(made, Tensor)
    assert made.dtype == dtype
    assert torch.equal(made, raw)
    made.zero_()  # the file is not written to
    assert torch.equal(torch.as_tensor(GgufFile(file.path).read("a")), raw)


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
def test_data_begin_where_the_alignment_says(tmp_path: Path, alignment: int) -> None:
    for size in range(1, 40, 13):
        first, second = np.full((1, 5), 7, np.float32), np.full((2, 3), 9, np.float32)
        tensors = {"first": (first, "F32"), "second": (second, "F32")}
        path = write(tmp_path / "a.gguf", {"general.name": "x" * size}, tensors, alignment)
        file = GgufFile(path)
        assert torch.equal(torch.as_tensor(file.read("second")), torch.from_numpy(second))
        assert torch.equal(torch.as_tensor(file.read("first")), torch.from_numpy(first))


def test_data_that_lie_at_an_odd_place_are_read(tmp_path: Path) -> None:
    data = random_blocks("Q4_0", 1, 1)
    path = write(tmp_path / "a.gguf", {}, {"a": (data, "Q4_0"), "b": (np.ones((1, 4), np.float32), "F32")}, alignment=1)
    assert torch.as_tensor(GgufFile(path).read("b")).tolist() == [[1.0] * 4]


def head(num_tensors: int = 0, num_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 2**63
HOSTILE = {
    "nothing": (b"", "the file is empty"),
    "another file": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "a mark alone": (b"GGUF", "cut off"),
    "cut off in the counts": (head()[:-3], "cut off"),
    "endless tensors": (head(HUGE), "cut off"),
    "endless keys": (head(0, HUGE), "cut off"),
    "a key without an end": (head(0, 1) + struct.pack("<Q", HUGE), "cut off"),
    "a text without an end": (head(0, 1) + text(b"k") + struct.pack("<IQ", 8, HUGE), "k would end at byte .* cut off"),
    "an endless list": (head(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 0, HUGE), "k would end"),
    "an endless list of texts": (head(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 8, HUGE), "k would end"),
    "an overflowing list": (head(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 12, 2**61), "k would end"),
    "a list of lists": (head(0, 1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1), "k is a list of a type of number 9"),
    "a type of no name": (head(0, 1) + text(b"k") + struct.pack("<I", 99), "type of number 99"),
    "a key twice": (head(0, 2) + 2 * (text(b"k") + struct.pack("<II", 4, 1)), "'k' is there twice"),
    "a text that is none": (head(0, 1) + text(b"k") + struct.pack("<I", 8) + text(b"\xff\xfe"), "k is not UTF-8"),
    "no alignment": (head(0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 0), "not a power of two"),
    "an odd alignment": (head(0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 24), "not a power of two"),
    "a wide alignment": (head(0, 1) + text(b"general.alignment") + struct.pack("<IQ", 10, 64), "in 32 bits"),
    "five dimensions": (head(1) + tensor(b"t", (1,) * 5), "t: a tensor of 5 dimensions"),
    "endless dimensions": (head(1) + text(b"t") + struct.pack("<I", 2**31), "t: a tensor of"),
    "a dimension of none": (head(1) + tensor(b"t", (4, 0)), r"t: .* cannot have the shape \[0, 4\]"),
    "no dimensions": (head(1) + tensor(b"t", ()), "t: .* cannot have the shape"),
    "more than there is": (head(1) + tensor(b"t", (HUGE, 2)), "t: its data end at byte"),
    "an overflowing size": (head(1) + tensor(b"t", (2**33, 2**33)), "t: its data end at byte"),
    "half a block": (head(1) + tensor(b"t", (48, 1), 2) + bytes(200), "Q4_0 cannot have the shape"),
    "data elsewhere": (head(1) + tensor(b"t", (4,), 0, 2**64 - 32) + bytes(200), "t: its data are at"),
    "data over others'": (head(2) + tensor(b"t", (8,)) + tensor(b"u", (8,)) + bytes(200), "u: its data are at 0"),
    "a tensor twice": (head(2) + 2 * tensor(b"t", (4,)) + bytes(200), "'t' is there twice"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "other byte order"),
    "version 1": (head(version=1), "version 1 of GGUF is not supported"),
    "version 4": (head(version=4), "version 4 of GGUF is not supported"),
    "a type that is not read": (head(1) + tensor(b"t", (256,), 23), "t: tensors of type IQ4_XS are not supported"),
    "a type of the future": (head(1) + tensor(b"t", (256,), 99), "t: tensors of type number 99"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_sound_file_is_refused_in_a_line_that_names_it(tmp_path: Path, case: str) -> None:
    content, reason = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"bad\.gguf: .*{reason}") as caught:
        GgufFile(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    metadata = {"general.name": "n", "a.list": [1, 2, 3], "a.texts": ["x", "yz"]}
    tensors = {"t": (np.ones((2, 8), np.float32), "F32"), "u": (random_blocks("Q8_0", 2, 1), "Q8_0")}
    whole = write(tmp_path / "whole.gguf", metadata, tensors).read_bytes()
    data_end = len(whole) - (-68 % 32)  # without the padding behind the last tensor
    for size in [*range(0, data_end, 7), data_end - 1]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf: "):
            GgufFile(path)
    (tmp_path / "cut.gguf").write_bytes(whole[:data_end])
    assert torch.as_tensor(GgufFile(tmp_path / "cut.gguf").read("t")).sum() == 16


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "a.gguf", {"a.b": 1.5}, {"t": (np.ones((2, 2), np.float32), "F32")})
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
    assert GgufFile(path).metadata["a.b"] == 1.5


def test_numbers_of_metadata_are_those_that_were_meant(tmp_path: Path) -> None:
    metadata = {"a.eps": 1e-5, "a.flag": True, "a.list": [0.5, 0.25], "a.base": 1e6, "a.text": "▁x"}
    found = GgufFile(write(tmp_path / "a.gguf", metadata, {})).metadata
    assert {key: found[key] for key in metadata} == metadata  # not 9.999999747378752e-06


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("bad", [b"\x00\x7c", b"\x00\x7e"], ids=["infinite", "NaN"])
def test_scales_that_are_not_finite_are_refused_by_name(tmp_path: Path, kind: str, bad: bytes) -> None:
    data = random_blocks(kind, 2, 2)
    place = 208 if kind == "Q6_K" else 0
    data[1, place : place + 2] = np.frombuffer(bad, np.uint8)
    file = GgufFile(write(tmp_path / "a.gguf", {}, {"blk.0.attn_q.weight": (data, kind)}))
    with pytest.raises(ModelError, match=r"a\.gguf: blk\.0\.attn_q\.weight holds scales that are NaN or infinite"):
        file.read("blk.0.attn_q.weight")


def test_floats_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path / "a.gguf", {}, {"t": (np.array([[1, np.inf]], np.float32), "F32")}))
    with pytest.raises(ModelError, match=r"a\.gguf: t holds weights that are NaN or infinite"):
        file.read("t")


def test_names_and_sizes_of_types_are_those_of_the_package() -> None:
    theirs = {kind.value: kind.name for kind in Types}
    ours = {**UNSUPPORTED, **{kind.number: kind.name for kind in TYPES.values()}}
    assert {number: ours.get(number) for number in theirs} == theirs
    for kind in TYPES.values():
        assert gguf.GGML_QUANT_SIZES[Types[kind.name]] == (kind.block, kind.num_bytes)


def make_set(folder: Path) -> list[Path]:
    """Write a set of three files, one tensor each."""
    paths = []
    for i in range(3):
        metadata: dict[str, Any] = {"split.no": i, "split.count": 3, "split.tensors.count": 3}
        path = folder / f"m-{i + 1:05}-of-00003.gguf"
        write(
            path, {**metadata, **({"a.key": "first"} if i == 0 else {})}, {f"t{i}": (np.full(2, i, np.float32), "F32")}
        )
        paths.append(path)
    return paths


@pytest.mark.parametrize("name", ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf", ""])
def test_any_file_of_a_set_or_its_folder_opens_the_set(tmp_path: Path, name: str) -> None:
    make_set(tmp_path)
    file = GgufFile(tmp_path / name if name else tmp_path)
    assert file.metadata["a.key"] == "first"
    assert [torch.as_tensor(file.read(f"t{i}")).tolist() for i in range(3)] == [[i, i] for i in range(3)]


def _remove(paths: list[Path]) -> Path:
    paths[1].unlink()
    return paths[0]


def _rename(paths: list[Path]) -> Path:
    return paths[0].rename(paths[0].with_name("model.gguf"))


def _swap(paths: list[Path]) -> Path:
    content = paths[1].read_bytes()
    paths[1].write_bytes(paths[2].read_bytes())
    paths[2].write_bytes(content)
    return paths[0]


def _repeat(paths: list[Path]) -> Path:
    write(paths[2], {"split.no": 2, "split.count": 3}, {"t0": (np.ones(2, np.float32), "F32")})
    return paths[0]


def _lose(paths: list[Path]) -> Path:
    write(paths[2], {"split.no": 2, "split.count": 3}, {})
    return paths[0]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_remove, r"m-00002-of-00003\.gguf: No such file"),
        (_rename, r"model\.gguf: one of 3 files, whose names must end"),
        (_swap, r"m-00002-of-00003\.gguf: its name says file 2 of 3"),
        (_repeat, r"m-00003-of-00003\.gguf: t0 is in m-00001-of-00003\.gguf too"),
        (_lose, "the set holds 2 tensors, and should hold 3"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_set_that_is_not_whole_is_refused(tmp_path: Path, spoil: Callable[[list[Path]], Path], reason: str) -> None:
    path = spoil(make_set(tmp_path))
    with pytest.raises(ModelError, match=reason):
        GgufFile(path)


@pytest.mark.parametrize("count", ["3", 0.5, True, 0])
def test_a_count_of_files_that_is_none_is_refused(tmp_path: Path, count: Any) -> None:
    path = write(tmp_path / "m-00001-of-00003.gguf", {"split.no": 0, "split.count": count}, {})
    with pytest.raises(ModelError, match=r"m-00001-of-00003\.gguf: (split\.count is|one of 0 files)"):
        GgufFile(path)


def test_a_set_of_one_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00001.gguf"
    write(path, {"split.no": 0, "split.count": 1}, {"t": (np.ones(2, np.float32), "F32")})
    assert GgufFile(path).shapes == {"t": (2,)}


def test_a_folder_of_two_models_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, {}, {})
    with pytest.raises(ModelError, match=r"several GGUF files; name one: a\.gguf, b\.gguf"):
        GgufFile(tmp_path)


def test_tensors_that_are_not_there_are_named(tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path / "a.gguf", {}, {}))
    with pytest.raises(ModelError, match=r"a\.gguf: there is no tensor blk\.0"):
        file.read("blk.0")


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"])
def test_trained_weights_mean_what_ggml_says_to_the_last_bit(name: str) -> None:
    file = GgufFile(gguf_files.real(name))
    picked = {kind: tensor for tensor, kind in sorted(file.types.items(), reverse=True) if kind in QUANTIZED}
    for kind, tensor in picked.items():
        made = file.read(tensor)
        assert isinstance(made, GroupedCodes)
        rows = torch.arange(min(made.num_outputs, 200))
        _, data, info = file._places[tensor]
        raw = np.asarray(data[info.offset : info.offset + info.num_bytes]).reshape(info.shape[0], -1)[: len(rows)]
        assert np.array_equal(bits(made.rows(rows).dequantize().numpy()), bits(gguf.dequantize(raw, Types[kind])))
