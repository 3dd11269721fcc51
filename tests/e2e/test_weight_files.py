"""Weight files that do not fit their configuration: what is missing is refused, what is left over is said."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quicksilver
from quicksilver.errors import ModelError, WeightFilesWarning
from quicksilver.weights.storage import INDEX
from tests import tiny
from tests.e2e.conftest import ModelFolder, Outcome

Tensors = dict[str, torch.Tensor]
Refused = Callable[..., str]
Copy = Callable[[str], ModelFolder]
TIED = "llama-tied-biased"


def rename(tensors: Tensors, change: Callable[[str], str]) -> None:
    renamed = {change(name): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


def add(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.zeros(3) for name in names})


def warned(folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quicksilver.load(folder)
    ours = [warning for warning in caught if issubclass(warning.category, WeightFilesWarning)]
    assert all(warning.filename == __file__ for warning in ours)
    return [str(warning.message) for warning in ours]


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_tensors_without_a_place_are_named(cli: Callable[..., Outcome], model_copy: Copy, family: str) -> None:
    names = [f"extra.{i}.weight" for i in range(5)]
    folder = model_copy(family).edit_weights(add(*names))
    (message,) = warned(folder)
    assert message.startswith(f"{folder}: the weight files hold tensors that the model has no place for")
    assert message.endswith("extra.0.weight, extra.1.weight, extra.2.weight and 2 more")
    for arguments in (
        ("generate", folder, "Once", "--max-new-tokens", 2),
        ("quantize", folder, "-o", folder.with_name("made")),
    ):
        outcome = cli(*arguments)
        assert outcome.status == 0
        assert outcome.said.count(f"quicksilver: note: {message}") == 1, outcome.err
        assert outcome.err.count("extra.0") == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight"),
        ({"attention_bias": False}, "model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_so_are_those_that_a_configuration_leaves_out(model_copy: Copy, changes: dict[str, Any], name: str) -> None:
    (message,) = warned(model_copy(TIED).edit_config(**changes))
    assert name in message


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "h.1.attn.masked_bias")),
        ("llama", ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")),
        ("qwen3", ("model.layers.3.self_attn.rotary_emb.inv_freq",)),
    ],
)
def test_constants_of_old_files_are_not(model_copy: Copy, family: str, names: tuple[str, ...]) -> None:
    assert warned(model_copy(family).edit_weights(add(*names))) == []


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_body_without_its_prefix_is_read(model_copy: Copy, family: str) -> None:
    prefix = {"gpt2": "transformer.", "llama": "model."}[family]
    folder = model_copy(family).edit_weights(lambda tensors: rename(tensors, lambda name: name.removeprefix(prefix)))
    assert warned(folder) == []


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_prefix_before_every_name_is_told(refused: Refused, model_copy: Copy, family: str, prefix: str) -> None:
    folder = model_copy(family).edit_weights(lambda tensors: rename(tensors, lambda name: prefix + name))
    refused("generate", folder, "Once", names=(folder, "missing keys: ", f"begin with '{prefix}'"))


def test_names_of_another_model_are_told(refused: Refused, model_copy: Copy) -> None:
    folder = model_copy("llama").edit_weights(
        lambda tensors: rename(tensors, lambda name: name.replace("model.", "model.language_model."))
    )
    line = refused("generate", folder, "Once", names=("missing keys: model.embed_tokens.weight",))
    assert "stored and not in the model: model.language_model.embed_tokens.weight" in line
    assert line.endswith("and 35 more")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.bias", "model.embed_tokens.weight"])
def test_a_missing_bias_or_embedding_is_named(refused: Refused, model_copy: Copy, name: str) -> None:
    folder = model_copy(TIED).edit_weights(lambda tensors: tensors.pop(name))
    refused("generate", folder, "Once", names=(folder, name))


def test_a_shape_is_told_in_plain_numbers(refused: Refused, model_copy: Copy) -> None:
    name = "model.norm.weight"
    folder = model_copy("llama").edit_weights(lambda tensors: tensors.update({name: torch.ones(31)}))
    refused("generate", folder, "Once", names=(f"{name} is [31], not [32]",))


@pytest.mark.parametrize("family", [TIED, "gpt2"])
def test_another_head_than_the_embedding_is_used_and_said(model_copy: Copy, family: str) -> None:
    folder = model_copy(family).edit_weights(
        lambda tensors: tensors.update({"lm_head.weight": torch.full((tiny.VOCAB, tiny.HIDDEN_SIZE), 0.5)})
    )
    ids = tiny.token_ids(5)[None]
    with pytest.warns(WeightFilesWarning, match="hold another lm_head.weight; that is used"):
        model = quicksilver.load(folder)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
        torch.testing.assert_close(model(ids).logits, theirs)
    assert bool((theirs[..., 0] == theirs[..., 1]).all())  # all rows of that head are alike


@pytest.mark.parametrize("only", [False, True], ids=["both", "the head alone"])
def test_a_tied_head_may_be_stored(model_copy: Copy, only: bool) -> None:
    def store(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if only:
            del tensors["model.embed_tokens.weight"]

    assert warned(model_copy(TIED).edit_weights(store)) == []


@pytest.mark.parametrize("family", [TIED, "gpt2"])
def test_a_tied_head_of_another_shape(refused: Refused, model_copy: Copy, family: str) -> None:
    folder = model_copy(family).edit_weights(
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(100, tiny.HIDDEN_SIZE)})
    )
    refused("generate", folder, "Once", names=(folder, "lm_head.weight", "tie_word_embeddings", "shape"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The tiny model in several files."""
    folder = tmp_path / "shards"
    tiny.model("llama").save_pretrained(folder, max_shard_size="40KB")
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_a_shard_that_is_missing(refused: Refused, shards: Path) -> None:
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    refused("generate", shards, "Once", names=(gone, "missing", INDEX))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 4}}', None])
def test_an_index_that_is_missing_or_damaged(refused: Refused, shards: Path, content: str | None) -> None:
    index = shards / INDEX
    if content is None:
        index.unlink()
    else:
        index.write_text(content)
    refused("generate", shards, "Once", names=(shards, INDEX))


def test_a_tensor_of_no_use_in_a_shard(shards: Path) -> None:
    path = sorted(shards.glob("*.safetensors"))[2]
    save_file({**load_file(path), "extra": torch.zeros(2)}, path, {"format": "pt"})
    (message,) = warned(shards)
    assert message.endswith(": extra")


def test_a_tensor_that_the_index_has_and_the_shard_has_not(refused: Refused, shards: Path) -> None:
    file = json.loads((shards / INDEX).read_text())["weight_map"]["lm_head.weight"]
    tensors = load_file(shards / file)
    del tensors["lm_head.weight"]
    save_file(tensors, shards / file, {"format": "pt"})
    refused("generate", shards, "Once", names=("missing keys: lm_head.weight",))


def test_a_quantized_folder_refuses_what_it_does_not_know(cli: Callable[..., Outcome], folder: Path) -> None:
    made = folder.with_name("quantized")
    assert cli("quantize", folder, "-o", made).status == 0
    path = made / "model.safetensors"
    save_file({**load_file(path), "extra": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(ModelError, match="header is damaged"):
        quicksilver.load(made)
