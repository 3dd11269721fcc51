"""Bad models: a folder, configuration, weight or tokenizer that cannot be used is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quicksilver
from quicksilver.errors import ModelError, UnsupportedModelError
from tests import tiny
from tests.e2e.conftest import ModelFolder

Refused = Callable[..., str]
TinyModelDir = Callable[[str], Path]


@pytest.mark.parametrize("place", ["./nowhere", "/nowhere/at/all", "a/b/c", ""])
def test_a_model_folder_that_is_not_there(refused: Refused, text_file: Path, place: str) -> None:
    refused("eval", place, "--text", text_file, names=(place, "no such model folder"))


def test_a_file_instead_of_a_model_folder(refused: Refused, folder: Path, text_file: Path) -> None:
    weights = folder / "model.safetensors"
    refused("eval", weights, "--text", text_file, names=(weights, "it is a file, and folders with"))


def test_a_folder_without_a_configuration(refused: Refused, tmp_path: Path, text_file: Path) -> None:
    refused("eval", tmp_path, "--text", text_file, names=(tmp_path, "config.json"))


@pytest.mark.parametrize("content", ["", "{", "[]", '"gpt2"', "{}", "\x00\x01"])
def test_a_corrupt_configuration(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, content: str
) -> None:
    folder = model_copy()
    (folder.path / "config.json").write_text(content)
    refused("eval", folder.path, "--text", text_file, names=(folder.path, "configuration"))


@pytest.mark.parametrize("family", ["mamba-foo", "bert", "gpt_neox", "t5", "mixtral"])
def test_an_unsupported_family(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, family: str
) -> None:
    folder = model_copy().edit_config(model_type=family)
    refused("eval", folder, "--text", text_file, names=(family,))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"n_head": 0}),
        ("gpt2", {"n_head": 5}),
        ("gpt2", {"n_layer": 0}),
        ("gpt2", {"n_layer": -1}),
        ("gpt2", {"vocab_size": "many"}),
        ("gpt2", {"activation_function": "nonesuch"}),
        ("gpt2", {"add_cross_attention": True}),
        ("llama", {"num_attention_heads": 0, "head_dim": None}),
        ("llama", {"num_key_value_heads": 3}),
        ("llama", {"num_key_value_heads": 0}),
        ("llama", {"num_hidden_layers": 0}),
        ("llama", {"max_position_embeddings": 0}),
        ("llama", {"hidden_act": "nonesuch"}),
        ("llama", {"rope_parameters": {"rope_type": "nonesuch", "rope_theta": 1e4}}),
        ("llama", {"head_dim": 7}),
        ("llama", {"vocab_size": 0}),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, family: str, changes: dict[str, Any]
) -> None:
    refused("eval", model_copy(family).edit_config(**changes), "--text", text_file, "--context", 32)


def test_windows_that_masks_do_not_follow_are_refused_by_reason(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path
) -> None:
    folder = model_copy("llama").edit_config(sliding_window=16)
    refused("eval", folder, "--text", text_file, names=("llama", "sliding_window=16"))


@pytest.mark.parametrize("rope_type", ["default", "linear"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_heads_rotated_in_part_are_refused_by_reason(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, family: str, rope_type: str
) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    folder = model_copy(family).edit_config(rope_parameters=rope)
    refused("eval", folder, "--text", text_file, names=(family, "partial_rotary_factor=0.5"))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"bits": 4},
    ],
    ids=lambda config: config.get("quant_method", "no method"),
)
def test_weights_quantized_by_another_package(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, config: dict[str, Any]
) -> None:
    folder = model_copy("llama").edit_config(quantization_config=config)
    refused("eval", folder, "--text", text_file, names=(folder, "quant"))


@pytest.mark.parametrize("content", ["[]", '{"eos_token_id": "x"}'])
def test_a_generation_configuration_that_makes_no_sense(
    refused: Refused, model_copy: Callable[..., ModelFolder], content: str
) -> None:
    folder = model_copy("llama").path
    (folder / "generation_config.json").write_text(content)
    refused("generate", folder, "Once", names=(folder,))


@pytest.mark.parametrize("present", [None, "pytorch_model.bin", "model.safetensors.index.json"])
def test_no_safetensors(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, present: str | None
) -> None:
    folder = model_copy()
    folder.weights.unlink()
    if present == "pytorch_model.bin":
        torch.save(tiny.model("llama").state_dict(), folder.path / present)
    elif present:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (folder.path / present).write_text(json.dumps(index))
    refused("eval", folder.path, "--text", text_file, names=(folder.path, ".safetensors"))


def _spoil(weights: Path, how: str) -> None:
    content = weights.read_bytes()
    header = int.from_bytes(content[:8], "little")
    spoilt = {
        "empty": b"",
        "a few bytes": content[:5],
        "cut in the header": content[: 8 + header // 2],
        "cut in the data": content[: len(content) * 2 // 3],
        "garbage header": content[:8] + bytes(range(1, 256)) * (header // 255 + 1),
        "flipped bits": content[:40] + bytes(b ^ 0xFF for b in content[40:80]) + content[80:],
        "absurd header length": b"\xff" * 8 + content[8:],
        "not safetensors": b"PK\x03\x04" + content,
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    weights.write_bytes(spoilt[how])


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "a few bytes",
        "cut in the header",
        "cut in the data",
        "garbage header",
        "flipped bits",
        "absurd header length",
        "not safetensors",
        "Git LFS pointer",
    ],
)
def test_corrupt_weights(refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, how: str) -> None:
    folder = model_copy()
    _spoil(folder.weights, how)
    refused("eval", folder.path, "--text", text_file, names=(folder.path, "weights"))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.2.mlp.c_fc.weight"),
        ("gpt2", "transformer.wte.weight"),
        ("llama", "model.layers.3.self_attn.o_proj.weight"),
        ("llama", "lm_head.weight"),
        ("qwen3", "model.layers.0.self_attn.k_norm.weight"),
    ],
)
def test_a_missing_weight_is_named(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, family: str, name: str
) -> None:
    folder = model_copy(family).edit_weights(lambda tensors: tensors.pop(name))
    line = refused("eval", folder, "--text", text_file, names=(folder,))
    # GPT-2's embedding is also its head, and may go by either name
    assert name in line or (name == "transformer.wte.weight" and "lm_head.weight" in line), line


@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "transformer.h.1.attn.c_attn.weight"), ("llama", "model.layers.0.mlp.up_proj.weight")]
)
def test_a_weight_of_the_wrong_shape_is_named(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, family: str, name: str
) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    folder = model_copy(family).edit_weights(cut)
    refused("eval", folder, "--text", text_file, names=(folder, name))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt2", "transformer.ln_f.bias"), ("llama", "model.layers.2.self_attn.v_proj.weight")],
)
def test_a_weight_that_is_not_finite_is_named(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, family: str, name: str, value: float
) -> None:
    def poison(tensors: dict[str, Any]) -> None:
        tensors[name].view(-1)[5] = value

    folder = model_copy(family).edit_weights(poison)
    refused("eval", folder, "--text", text_file, names=(name, "NaN"))
    refused("generate", folder, "Once", names=(name, "NaN"))


def test_weights_too_large_for_the_dtype_are_named(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    folder = model_copy().edit_weights(lambda tensors: tensors[name].mul_(1e6))
    refused("eval", folder, "--text", text_file, "--dtype", "float16", names=(name,))


def test_accelerate_refuses_what_load_refuses() -> None:
    poisoned = tiny.from_config(tiny.CONFIGS["gpt2"]())
    with torch.no_grad():
        poisoned.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight"):
        quicksilver.accelerate(poisoned)
    with pytest.raises(UnsupportedModelError, match="LlamaModel"):
        quicksilver.accelerate(tiny.model("llama").model)


@pytest.mark.parametrize("stored", [["a"], "a", 7], ids=str)
def test_a_quantization_config_that_is_no_object(
    refused: Refused, model_copy: Callable[..., ModelFolder], stored: Any
) -> None:
    folder = model_copy("llama").edit_config(quantization_config=stored)
    refused("generate", folder, "Once", names=(folder, "quantization_config must be an object"))


def test_a_folder_without_a_tokenizer(refused: Refused, model_copy: Callable[..., ModelFolder]) -> None:
    folder = model_copy("gpt2").path
    for path in folder.glob("*token*"):
        path.unlink()
    refused("generate", folder, "Once", names=(folder, "there is no tokenizer in this folder"))


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_a_missing_or_corrupt_tokenizer(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path, content: str | None
) -> None:
    folder = model_copy("gpt2").path
    tokenizer = folder / "tokenizer.json"
    if content is None:
        for path in folder.glob("*token*"):
            path.unlink()
    else:
        tokenizer.write_text(content)
    refused("eval", folder, "--text", text_file, "--context", 32, names=(folder, "tokenizer"))


def test_a_tokenizer_of_another_model(
    refused: Refused, model_copy: Callable[..., ModelFolder], text_file: Path
) -> None:
    """A vocabulary larger than the model's embedding: ids out of range."""
    folder = model_copy("llama").edit_config(vocab_size=100)
    ModelFolder(folder).edit_weights(
        lambda tensors: tensors.update(
            {name: tensors[name][:100].contiguous() for name in ("lm_head.weight", "model.embed_tokens.weight")}
        )
    )
    names = ("token id", "vocabulary of 100")
    refused("eval", folder, "--text", text_file, "--context", 32, names=names)
    refused("generate", folder, "The zebra", "--max-new-tokens", 3, names=names)


def test_a_folder_that_has_gguf_weights_only_says_how_to_name_them(
    refused: Callable[..., str], folder: Path, tmp_path: Path, text_file: Path
) -> None:
    model = tmp_path / "mixed"
    model.mkdir()
    (model / "config.json").write_text((folder / "config.json").read_text())
    (model / "model.gguf").write_bytes(b"GGUF")
    refused("eval", model, "--text", text_file, names=(model, "a GGUF file in it is read where it is named"))


def test_a_gguf_file_that_is_cut_off_is_refused(refused: Callable[..., str], tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    for model in (folder, folder / "model-q4.gguf"):
        refused("eval", model, "--text", text_file, names=(folder / "model-q4.gguf", "it is cut off"))
