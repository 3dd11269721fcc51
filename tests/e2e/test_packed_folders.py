"""GPTQ and AWQ folders: run with exactly the weights that they hold, or refused by file and tensor in one line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quicksilver
from quicksilver.errors import ModelError, UnsupportedModelError, WeightFilesWarning
from quicksilver.families.family import family_of
from quicksilver.loading.packed import float_model, read_packed
from quicksilver.quant.storage import INDEX
from quicksilver.weights.codes import GroupedCodes
from tests import tiny
from tests.packing import PackedFolder, draw, packed_folder

Refused = Callable[..., str]
Q_PROJ, V_PROJ, DOWN_PROJ = (
    f"model.layers.1.{path}" for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
)
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptq_v2": {"layout": "gptq_v2", "writer": "fields"},
    "gptq of 8 bits": {"bits": 8, "symmetric": True},
    "awq": {"method": "awq"},
}


@pytest.fixture
def folder() -> PackedFolder:
    return packed_folder("llama", symmetric=True)


def assert_read(path: Path, wanted: Any) -> None:
    """Check that a folder is read as this model's weights, bit for bit, and nothing is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeightFilesWarning)
        found, wanted = float_model(path).state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as refused:
        float_model(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def tensor(path: Path, name: str) -> str:
    return f"{path / 'model.safetensors'}: tensor '{name}'"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, kind) for name in ("llama", "qwen2") for kind in KINDS],
        *[(name, kind) for name in ("gpt2", "llama-tied-biased", "phi3", "qwen3") for kind in ("gptq", "awq")],
    ],
)
def test_a_folder_is_run_with_exactly_its_weights(tmp_path: Path, name: str, kind: str) -> None:
    made = packed_folder(name, **KINDS[kind])
    path = made.write(tmp_path)
    assert_read(path, made.model)
    ids = tiny.token_ids(12)[None]
    loaded = quicksilver.load(path)
    assert torch.equal(loaded(ids).logits, quicksilver.accelerate(made.model)(ids).logits)
    assert getattr(loaded.config, "quantization_config", None) is None


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_codes_and_floats_have_the_models_names(tmp_path: Path, name: str) -> None:
    made = packed_folder(name)
    with torch.device("meta"):
        outline = type(made.model)(made.model.config)
    found = dict(read_packed(made.write(tmp_path), outline))
    assert found.keys() == dict(made.model.named_parameters()).keys()
    for key, value in found.items():
        module = key.removesuffix(".weight")
        assert isinstance(value, GroupedCodes) == (module in made.maps)
        if isinstance(value, GroupedCodes):
            assert torch.equal(value.dequantize(), made.maps[module].weight())
        else:
            assert torch.equal(value, made.model.get_parameter(key))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_other_dtypes_round_the_same_weights(tmp_path: Path, folder: PackedFolder, dtype: str) -> None:
    path = folder.write(tmp_path, {"dtype": "float16"})
    loaded = quicksilver.load(path, dtype=dtype)
    wanted = torch.float16 if dtype == "auto" else getattr(torch, dtype)
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(weight, folder.model.get_parameter(name).to(wanted))
    inv_freq = loaded.model.get_buffer("model.rotary_emb.inv_freq")
    assert torch.equal(inv_freq, folder.model.get_buffer("model.rotary_emb.inv_freq"))


def test_generation_settings_are_read(tmp_path: Path, folder: PackedFolder) -> None:
    path = folder.write(tmp_path, generation_config={"eos_token_id": [0, 7], "top_k": 3})
    assert quicksilver.load(path).model.generation_config.eos_token_id == [0, 7]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_tensors_say_what_is_quantized(tmp_path: Path, method: str) -> None:
    """Not `modules_to_not_convert`, which tools lose."""
    made = packed_folder("llama", method)
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        made.edit(V_PROJ, part, None)
    made.edit(V_PROJ, "weight", made.model.get_submodule(V_PROJ).weight.detach())
    made.settings["modules_to_not_convert"] = [Q_PROJ]
    assert_read(made.write(tmp_path), made.model)


def test_maps_with_bits_and_groups_of_their_own(tmp_path: Path, folder: PackedFolder) -> None:
    for path, bits, group_size in ((V_PROJ, 8, 32), (DOWN_PROJ, 4, 16)):
        other = draw(*folder.model.get_submodule(path).weight.shape, bits, group_size, symmetric=True)
        folder.model.get_submodule(path).weight.data = other.weight()
        for part, value in other.gptq(writer="words").items():
            folder.edit(path, part, value)
    without = refusal(folder.write(tmp_path / "without"))
    assert without.startswith(tensor(tmp_path / "without", f"{V_PROJ}.qweight"))
    assert "4 bits and group_size 32" in without
    folder.settings["dynamic"] = {rf"{V_PROJ}$": {"bits": 8}, r".*\.1\.mlp\.down": {"group_size": 16}}
    assert_read(folder.write(tmp_path / "with"), folder.model)


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "gpt2"])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_head_may_be_quantized_tied_to_a_plain_embedding_or_not(tmp_path: Path, kind: str, name: str) -> None:
    made = packed_folder(name, kind)
    tied = made.model.config.tie_word_embeddings
    head = draw(tiny.VOCAB, tiny.HIDDEN_SIZE)
    made.tensors.pop("lm_head.weight", None)
    for part, value in (head.awq() if kind == "awq" else head.gptq(writer="words")).items():
        made.edit("lm_head", part, value)
    made.model.config.tie_word_embeddings = False
    made.model.lm_head.weight = torch.nn.Parameter(head.weight())
    path = made.write(tmp_path, {"tie_word_embeddings": tied})
    assert_read(path, made.model)
    loaded = quicksilver.load(path).model
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
    assert not loaded.config.tie_word_embeddings


def test_a_tied_head_may_be_stored_again(tmp_path: Path) -> None:
    made = packed_folder("llama-tied-biased")
    made.tensors["lm_head.weight"] = made.tensors["model.embed_tokens.weight"].clone()
    path = made.write(tmp_path)
    assert_read(path, made.model)
    loaded = quicksilver.load(path).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_another_plain_head_where_it_should_be_tied_is_used_and_told(tmp_path: Path) -> None:
    made = packed_folder("llama-tied-biased")
    head = made.tensors["lm_head.weight"] = made.tensors["model.embed_tokens.weight"] + 1
    path = made.write(tmp_path)
    with pytest.warns(WeightFilesWarning, match=r"ties the head.*another lm_head\.weight") as caught:
        loaded = quicksilver.load(path).model
    assert [warning.filename for warning in caught if warning.category is WeightFilesWarning] == [__file__]
    assert torch.equal(loaded.lm_head.weight, head)
    assert torch.equal(loaded.model.embed_tokens.weight, made.model.model.embed_tokens.weight)


def test_an_untied_head_that_is_missing_is_named(tmp_path: Path, folder: PackedFolder) -> None:
    del folder.tensors["lm_head.weight"]
    assert refusal(folder.write(tmp_path)) == (
        f"{tmp_path}: tensor 'lm_head.weight' is missing, and so is 'lm_head.qweight'"
    )


def test_biases_of_zeros_for_maps_that_have_none_are_let_be(tmp_path: Path, folder: PackedFolder) -> None:
    for name, made in folder.maps.items():
        folder.edit(name, "bias", torch.zeros(made.codes.shape[1]).half())
    assert_read(folder.write(tmp_path / "zeros"), folder.model)
    folder.edit(Q_PROJ, "bias", torch.ones(32))
    name = f"{Q_PROJ}.bias"
    assert refusal(folder.write(tmp_path / "ones")).startswith(f"{tensor(tmp_path / 'ones', name)} has no place")


def test_a_bias_counts_and_one_that_is_missing_is_named(tmp_path: Path) -> None:
    made = packed_folder("qwen2", "awq")
    name = f"{Q_PROJ}.bias"
    assert bool(made.tensors[name].any())
    del made.tensors[name]
    assert refusal(made.write(tmp_path)) == f"{tmp_path}: tensor '{name}' is missing"


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
    ],
)
def test_constants_of_old_files_are_let_be(tmp_path: Path, name: str, constant: str) -> None:
    made = packed_folder(name)
    made.tensors[constant] = torch.ones(4)
    assert_read(made.write(tmp_path), made.model)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.act.scales",
        f"{Q_PROJ}.weight_packed",
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


@pytest.mark.parametrize(
    ("file", "stated"),
    [
        (
            "quantize_config",
            {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "meta": {"quantizer": "x:1"}},
        ),
        ("quant_config", {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}),
    ],
)
def test_settings_may_lie_in_a_file_of_their_own(tmp_path: Path, file: str, stated: dict[str, Any]) -> None:
    made = packed_folder("llama", "awq" if file == "quant_config" else "gptq", symmetric=file == "quantize_config")
    made.settings = {}
    path = made.write(tmp_path, **{file: stated})
    assert_read(path, made.model)
    quicksilver.load(path)


def test_such_a_file_beside_plain_weights_says_nothing(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    assert torch.equal(quicksilver.load(tmp_path).model.lm_head.weight, tiny.model("llama").lm_head.weight)


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


def test_it_is_not_quantized_again(refused: Refused, tmp_path: Path, folder: PackedFolder) -> None:
    path = folder.write(tmp_path / "folder")
    refused("quantize", path, "-o", tmp_path / "made", names=(path, "quantized already"))


def sharded(path: Path) -> tuple[str, str]:
    """Cut a folder's file in two, a map's tensors among them; return the names of both."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = {name: files[name.endswith(("scales", "norm.weight"))] for name in tensors}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def test_a_maps_tensors_may_lie_in_several_files(tmp_path: Path, folder: PackedFolder) -> None:
    path = folder.write(tmp_path)
    files = sharded(path)
    assert_read(path, folder.model)
    tensors = load_file(path / files[1])
    tensors[f"{Q_PROJ}.scales"][0, 0] = float("nan")
    save_file(tensors, path / files[1])
    assert refusal(path) == f"{path / files[1]}: tensor '{Q_PROJ}.scales' holds NaN or infinite values"


@pytest.mark.parametrize("how", ["missing", "cut", "another tensor"])
def test_damaged_files_are_named(tmp_path: Path, folder: PackedFolder, how: str) -> None:
    path = folder.write(tmp_path)
    shard = path / sharded(path)[0]
    content = shard.read_bytes()
    shard.unlink()
    if how == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif how == "another tensor":
        save_file({"other": torch.ones(3)}, shard)
    line = refusal(path)
    assert line.startswith(f"{shard}: ")
    assert {"missing": "missing", "cut": "damaged or cut off", "another tensor": "index"}[how] in line


def test_zeros_that_programs_read_in_different_ways_are_told_once(tmp_path: Path) -> None:
    made = packed_folder("llama", writer="fields")
    path = made.write(tmp_path)
    with pytest.warns(
        WeightFilesWarning, match=r"zeros of model\.layers\.0\.\S+, .* and \d+ more may have been 0"
    ) as caught:
        loaded = quicksilver.load(path)
    assert [warning.filename for warning in caught if warning.category is WeightFilesWarning] == [__file__]
    for name, made_of in made.maps.items():
        assert torch.equal(loaded.model.get_submodule(name).weight, made_of.weight())


def test_the_weights_of_a_family_that_puts_inputs_first_are_not_transposed_twice(tmp_path: Path) -> None:
    made = packed_folder("gpt2")
    assert family_of(made.model.config).inputs_first
    square = "transformer.h.0.attn.c_proj"
    found = float_model(made.write(tmp_path)).get_submodule(square).weight
    assert torch.equal(found, made.maps[square].weight().T)
