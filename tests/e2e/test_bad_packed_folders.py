"""GPTQ and AWQ folders that cannot be taken over exactly are refused in one line, by file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import quicksilver
from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.loading.packed import packed_model
from tests import tiny
from tests.packing import PackedFolder, packed_folder, shard

Refused = Callable[..., str]
Q_PROJ, DOWN_PROJ = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def folder() -> PackedFolder:
    return packed_folder("llama", symmetric=True)


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as refused:
        packed_model(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def tensor(path: Path, name: str) -> str:
    return f"{path / 'model.safetensors'}: tensor '{name}'"


def test_an_untied_head_that_is_missing_is_named(tmp_path: Path, folder: PackedFolder) -> None:
    del folder.tensors["lm_head.weight"]
    assert refusal(folder.write(tmp_path)) == (
        f"{tmp_path}: tensor 'lm_head.weight' is missing, and so is 'lm_head.qweight'"
    )


def test_a_bias_counts_and_one_that_is_missing_is_named(tmp_path: Path) -> None:
    made = packed_folder("qwen2", "awq")
    name = f"{Q_PROJ}.bias"
    assert bool(made.tensors[name].any())
    del made.tensors[name]
    assert refusal(made.write(tmp_path)) == f"{tmp_path}: tensor '{name}' is missing"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.act.scales",
        f"{Q_PROJ}.weight_packed",
        f"{Q_PROJ}.bias",
        f"{Q_PROJ}.lora_A.weight",
        "model.layers.4.mlp.up_proj.qweight",
        "model.embed_tokens.qweight",
    ],
)
def test_tensors_without_a_place_are_refused(tmp_path: Path, folder: PackedFolder, name: str) -> None:
    folder.tensors[name] = torch.ones(8)
    assert refusal(folder.write(tmp_path)).startswith(f"{tensor(tmp_path, name)} has no place")


def test_a_map_that_is_both_plain_and_quantized_is_refused(tmp_path: Path, folder: PackedFolder) -> None:
    folder.tensors[f"{Q_PROJ}.weight"] = folder.model.get_submodule(Q_PROJ).weight.detach()
    assert f"{Q_PROJ}." in refusal(folder.write(tmp_path))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_missing_part_is_named(tmp_path: Path, method: str, part: str) -> None:
    line = refusal(packed_folder("llama", method).edit(Q_PROJ, part, None).write(tmp_path))
    missing = "weight" if part == "qweight" else part
    assert line.startswith(f"{tmp_path}: tensor '{Q_PROJ}.{missing}' is missing")
    if part == "qweight":
        assert f"and so is '{Q_PROJ}.qweight'; stored in its place: {Q_PROJ}." in line


SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    "scales": lambda scales: scales.fill_(float("nan")),
    "qzeros": lambda qzeros: qzeros.repeat(2, 1),
    "qweight": lambda qweight: qweight[1:],
    "g_idx": lambda g_idx: g_idx.flip(0).roll(3),
}


@pytest.mark.parametrize("part", SPOILT)
def test_a_spoilt_tensor_is_refused_in_one_line(
    refused: Refused, tmp_path: Path, folder: PackedFolder, part: str
) -> None:
    name = f"{DOWN_PROJ}.{part}"
    folder.tensors[name] = SPOILT[part](folder.tensors[name].clone())
    path = folder.write(tmp_path / "folder")
    refused("generate", path, "Once", names=(tensor(path, name),))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("model.norm.weight", lambda weight: weight[1:], "has shape [31], not [32]"),
        ("model.norm.weight", lambda weight: weight.int(), "is int32"),
        ("model.embed_tokens.weight", lambda weight: weight.fill_(float("inf")), "holds NaN or infinite values"),
    ],
)
def test_a_plain_tensor_that_does_not_fit_is_named(
    tmp_path: Path, folder: PackedFolder, name: str, change: Callable[[Tensor], Tensor], reason: str
) -> None:
    folder.tensors[name] = change(folder.tensors[name].clone())
    assert refusal(folder.write(tmp_path)).startswith(f"{tensor(tmp_path, name)} {reason}")


def test_other_sizes_than_the_configuration_says_are_refused(tmp_path: Path, folder: PackedFolder) -> None:
    line = refusal(folder.write(tmp_path, {"intermediate_size": 64}))
    assert "has shape" in line
    assert ".mlp." in line


def test_files_that_contradict_each_other_are_refused(tmp_path: Path, folder: PackedFolder) -> None:
    path = folder.write(tmp_path, quantize_config={"bits": 8, "group_size": 32})
    line = refusal(path)
    assert str(path / "config.json") in line
    assert str(path / "quantize_config.json") in line


def test_quantized_tensors_without_settings_are_refused(tmp_path: Path, folder: PackedFolder) -> None:
    folder.settings = {}
    path = folder.write(tmp_path)
    assert refusal(path) == (
        f"{path}: neither config.json nor quantize_config.json nor quant_config.json says how weights are packed"
    )
    with pytest.raises(ModelError, match=r"missing keys: .*qweight"):
        quicksilver.load(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"bits": 4}', "\x00"])
def test_a_corrupt_file_of_settings_is_named(tmp_path: Path, folder: PackedFolder, content: str) -> None:
    folder.settings = {}
    path = folder.write(tmp_path)
    (path / "quantize_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"quantize_config\.json"):
        quicksilver.load(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        {"quant_method": "fp8"},
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_what_is_not_supported_is_refused_by_name(
    refused: Refused, tmp_path: Path, folder: PackedFolder, settings: dict[str, Any]
) -> None:
    folder.settings = settings
    path = folder.write(tmp_path / "folder")
    name = settings.get("checkpoint_format") or settings.get("version") or settings["quant_method"]
    refused("generate", path, "Once", names=(path, f"'{name}'", "not supported"))
    with pytest.raises(UnsupportedModelError):
        quicksilver.load(path)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_plain_weights_that_are_called_quantized_are_refused(tmp_path: Path, method: str) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({**stored, "quantization_config": settings}))
    assert refusal(tmp_path).endswith(f"says {method}, but no weight of the folder is quantized so")


@pytest.mark.parametrize("how", ["missing", "cut", "another tensor"])
def test_damaged_files_are_named(tmp_path: Path, folder: PackedFolder, how: str) -> None:
    path = folder.write(tmp_path)
    file = path / shard(path)[0]
    content = file.read_bytes()
    file.unlink()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "another tensor":
        save_file({"other": torch.ones(3)}, file)
    line = refusal(path)
    assert line.startswith(f"{file}: ")
    assert {"missing": "missing", "cut": "damaged or cut off", "another tensor": "index"}[how] in line


def test_the_file_of_a_tensor_is_named_where_there_are_several(tmp_path: Path, folder: PackedFolder) -> None:
    name = f"{Q_PROJ}.scales"
    folder.tensors[name][0, 0] = float("nan")
    path = folder.write(tmp_path)
    file = path / shard(path)[1]
    assert refusal(path) == f"{file}: tensor '{name}' holds NaN or infinite values"
