"""GPTQ and AWQ folders run with exactly the weights that they hold."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quicksilver
from quicksilver.errors import ModelError, WeightFilesWarning
from quicksilver.families.family import family_of
from quicksilver.loading.packed import packed_model, read_packed
from quicksilver.weights import AnyPrecisionLinear
from quicksilver.weights.codes import GroupedCodes
from tests import tiny, tolerances
from tests.e2e.conftest import Outcome, assert_refusal
from tests.packing import PackedFolder, draw, packed_folder, shard, weights_of

Cli = Callable[..., Outcome]

V_PROJ, DOWN_PROJ = "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"
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
        found, wanted = weights_of(packed_model(path)), wanted.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


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
    expected = quicksilver.accelerate(made.model)(ids).logits
    torch_only = quicksilver.load(path, kernels="torch")(ids).logits
    torch.testing.assert_close(torch_only, expected, atol=tolerances.LOGITS[torch.float32], rtol=0)
    assert (loaded(ids).logits - expected).norm() < 0.03 * expected.norm()  # kernels round activations
    assert loaded.config.quantization_config["method"] == "taken over"


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
    found = weights_of(loaded.model)
    for name in folder.maps:  # codes are what they are
        assert torch.equal(found[f"{name}.weight"], folder.model.get_submodule(name).weight)
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
    made.settings["modules_to_not_convert"] = ["q_proj"]
    assert_read(made.write(tmp_path), made.model)


def test_maps_with_bits_and_groups_of_their_own(tmp_path: Path, folder: PackedFolder) -> None:
    for path, bits, group_size in ((V_PROJ, 8, 32), (DOWN_PROJ, 4, 16)):
        other = draw(*folder.model.get_submodule(path).weight.shape, bits, group_size, symmetric=True)
        folder.model.get_submodule(path).weight.data = other.weight()
        for part, value in other.gptq(writer="words").items():
            folder.edit(path, part, value)
    with pytest.raises(ModelError, match=rf"'{V_PROJ}\.qweight' has shape .* 4 bits and group_size 32"):
        packed_model(folder.write(tmp_path / "without"))
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
    assert isinstance(loaded.lm_head, AnyPrecisionLinear)
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


def test_biases_of_zeros_for_maps_that_have_none_are_let_be(tmp_path: Path, folder: PackedFolder) -> None:
    for name, made in folder.maps.items():
        folder.edit(name, "bias", torch.zeros(made.codes.shape[1]).half())
    assert_read(folder.write(tmp_path), folder.model)


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


def test_a_maps_tensors_may_lie_in_several_files(tmp_path: Path, folder: PackedFolder) -> None:
    path = folder.write(tmp_path)
    shard(path)
    assert_read(path, folder.model)


def test_zeros_that_programs_read_in_different_ways_are_told_once(tmp_path: Path) -> None:
    made = packed_folder("llama", writer="fields")
    path = made.write(tmp_path)
    with pytest.warns(
        WeightFilesWarning, match=r"zeros of model\.layers\.0\.\S+, .* and \d+ more may have been 0"
    ) as caught:
        loaded = quicksilver.load(path)
    assert [warning.filename for warning in caught if warning.category is WeightFilesWarning] == [__file__]
    for name, made_of in made.maps.items():
        assert torch.equal(loaded.model.get_submodule(name).dequantize(), made_of.weight())


def test_the_weights_of_a_family_that_puts_inputs_first_are_not_transposed_twice(tmp_path: Path) -> None:
    made = packed_folder("gpt2")
    assert family_of(made.model.config).inputs_first
    square = "transformer.h.0.attn.c_proj"
    found = packed_model(made.write(tmp_path)).get_submodule(square)
    assert torch.equal(found.dequantize(), made.maps[square].weight())


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen2"])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_codes_are_written_and_read_again_bit_for_bit(cli: Cli, tmp_path: Path, kind: str, name: str) -> None:
    made = packed_folder(name, kind)
    path = made.write(tmp_path / "packed")
    outcome = cli("quantize", path, "-o", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    first, second = (quicksilver.load(folder).model for folder in (path, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["method"] == "taken over"
    found, wanted = weights_of(second), weights_of(first)
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    stored = dict(second.named_buffers())
    for key, buffer in first.named_buffers():
        assert torch.equal(stored[key], buffer), key


def test_a_folder_with_plain_maps_runs_as_floats(cli: Cli, tmp_path: Path) -> None:
    made = packed_folder("llama", "awq")
    for part in ("qweight", "qzeros", "scales"):
        made.edit(V_PROJ, part, None)
    made.edit(V_PROJ, "weight", made.model.get_submodule(V_PROJ).weight.detach())
    path = made.write(tmp_path / "packed")
    assert not any(isinstance(module, AnyPrecisionLinear) for module in quicksilver.load(path).model.modules())
    assert_refusal(cli("quantize", path, "-o", tmp_path / "out"), path, "others codes")


@pytest.mark.parametrize("option", ["--keep-head", "--group-size=64"])
def test_what_is_taken_over_is_not_rounded(cli: Cli, tmp_path: Path, folder: PackedFolder, option: str) -> None:
    outcome = cli("quantize", folder.write(tmp_path / "packed"), "-o", tmp_path / "out", option)
    assert_refusal(outcome, "taken over as they are", option.split("=")[0])
    assert not (tmp_path / "out").exists()
