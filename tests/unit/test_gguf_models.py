"""GGUF files become transformers' models with the same logits; what may change what they compute is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    Qwen2Config,
)

import quicksilver
from quicksilver.errors import ModelError
from quicksilver.loading.gguf.model import GgufModel, float_model
from quicksilver.weights.codes import GroupedCodes
from tests import gguf_files, tiny, tolerances
from tests.gguf_files import describe, pairs, random_blocks, stored, write
from tests.gguf_models import CONFIGS, GEMMA, IDS, SIZES, changed, model_of


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_model_that_was_written(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    path = gguf_files.write_model(tmp_path / "model.gguf", model)
    read = float_model(GgufModel(path))
    torch.testing.assert_close(logits(read), logits(model), atol=tolerances.LOGITS[torch.float32], rtol=0)
    ours = quicksilver.load(path)
    torch.testing.assert_close(logits(ours), logits(model), atol=tolerances.LOGITS[torch.float32], rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_rows_of_queries_and_keys_are_put_in_order_in_llama_alone(tmp_path: Path, name: str) -> None:
    """File rows are HF rows 0, 4, 1, 5, 2, 6, 3, 7 of each head; each part of the tensor alone is put right."""
    rows = torch.arange(16.0)[:, None].expand(16, 32).contiguous()

    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["blk.0.attn_k.weight"] = (rows.numpy(), "F32")

    read = dict(GgufModel(changed(tmp_path, name, change)).tensors())["model.layers.0.self_attn.k_proj.weight"]
    of_a_head = [0, 2, 4, 6, 1, 3, 5, 7] if name == "llama" else list(range(8))
    assert torch.as_tensor(read)[:, 0].tolist() == [*of_a_head, *(8 + i for i in of_a_head)]


@pytest.mark.parametrize("part", ["attn_q", "attn_k"])
def test_the_order_of_rows_shows_in_the_logits(tmp_path: Path, part: str) -> None:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        weight, kind = tensors[f"blk.0.{part}.weight"]
        heads = 4 if part == "attn_q" else 2
        tensors[f"blk.0.{part}.weight"] = (pairs(torch.from_numpy(weight), heads).numpy(), kind)

    read = float_model(GgufModel(changed(tmp_path, "llama", change)))
    assert float((logits(read) - logits(model_of("llama"))).abs().max()) > 0.01


def test_codes_and_scales_travel_with_their_rows(tmp_path: Path) -> None:
    blocks = random_blocks("Q5_1", 32, 1)
    plain = {"blk.0.attn_q.weight": (blocks, "Q5_1"), "blk.0.attn_v.weight": (blocks[:16], "Q5_1")}
    path = changed(tmp_path, "llama", lambda metadata, tensors: tensors.update(plain))
    model = GgufModel(path)
    read = dict(model.tensors())
    query, value = (read[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qv")
    assert isinstance(query, GroupedCodes)
    assert isinstance(value, GroupedCodes)
    stored_query = model.file.read("blk.0.attn_q.weight")
    assert isinstance(stored_query, GroupedCodes)
    assert torch.equal(pairs(query.dequantize(), 4), stored_query.dequantize())
    assert torch.equal(value.dequantize(), stored_query.dequantize()[:16])
    assert model.is_quantized
    weight = float_model(model).get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(weight, query.dequantize())


@pytest.mark.parametrize("name", ["llama", "llama, biased", "qwen2", "qwen3"])
def test_fused_projections_are_split_by_heads(tmp_path: Path, name: str) -> None:
    def fuse(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for i in range(2):
            for kind in ("weight", "bias"):
                names = [f"blk.{i}.attn_{part}.{kind}" for part in "qkv"]
                if names[0] in tensors:
                    parts = [tensors.pop(each)[0] for each in names]
                    tensors[f"blk.{i}.attn_qkv.{kind}"] = (np.concatenate(parts), "F32")

    read = float_model(GgufModel(changed(tmp_path, name, fuse)))
    assert torch.equal(logits(read), logits(float_model(GgufModel(_whole(tmp_path, name)))))


def _whole(folder: Path, name: str) -> Path:
    return gguf_files.write_model(folder / "whole.gguf", model_of(name))


def test_a_head_of_its_own_counts_and_without_one_it_is_the_embedding(tmp_path: Path) -> None:
    untied = float_model(GgufModel(_whole(tmp_path, "qwen2")))
    path = changed(tmp_path, "qwen2", lambda metadata, tensors: tensors.pop("output.weight"))
    tied = float_model(GgufModel(path))
    assert (untied.config.tie_word_embeddings, tied.config.tie_word_embeddings) == (False, True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, untied.model.embed_tokens.weight)
    assert float((logits(tied) - logits(untied)).abs().max()) > 0.01


def test_a_head_counts_in_any_file_of_a_set(tmp_path: Path) -> None:
    metadata, tensors = describe(model_of("llama").config), stored(model_of("llama"))
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        split = {"split.no": i, "split.count": 2, "split.tensors.count": len(names)}
        path = tmp_path / f"m-{i + 1:05}-of-00002.gguf"
        write(path, {**metadata, **split} if i == 0 else split, {name: tensors[name] for name in part})
    ours = quicksilver.load(tmp_path)  # the folder
    torch.testing.assert_close(logits(ours), logits(model_of("llama")), atol=tolerances.LOGITS[torch.float32], rtol=0)


def test_biases_count_and_are_zero_where_they_are_not_stored(tmp_path: Path) -> None:
    whole = logits(float_model(GgufModel(_whole(tmp_path, "qwen2"))))
    for name, same in (("blk.0.attn_q.bias", False), ("blk.1.attn_v.bias", False)):
        path = changed(tmp_path, "qwen2", lambda metadata, tensors, name=name: tensors.pop(name))
        read = float_model(GgufModel(path))
        assert torch.equal(logits(read), whole) == same
    zeros = dict(GgufModel(path).tensors())["model.layers.1.self_attn.v_proj.bias"]
    assert torch.equal(torch.as_tensor(zeros), torch.zeros(16))
    only_queries = [f"blk.{i}.attn_{part}.bias" for i in range(2) for part in ("k", "v", "output")]

    def drop(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in only_queries:
            del tensors[name]

    read = float_model(GgufModel(changed(tmp_path, "llama, biased", drop)))
    assert read.config.attention_bias
    assert float(read.model.layers[0].self_attn.o_proj.bias.detach().abs().sum()) == 0


def test_norms_of_gemma_are_stored_with_the_one_that_transformers_adds(tmp_path: Path) -> None:
    def ones(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name, (array, kind) in tensors.items():
            if name.endswith("norm.weight"):
                tensors[name] = (np.ones_like(array), kind)

    read = float_model(GgufModel(changed(tmp_path, "gemma3", ones)))
    norms = {name: p for name, p in read.named_parameters() if "norm" in name}
    assert {name.split(".")[-2] for name in norms} >= {"q_norm", "k_norm", "norm", "post_feedforward_layernorm"}
    assert not any(p.any() for p in norms.values())
    x = torch.randn(2, 32)
    scaled = x / (x.pow(2).mean(-1, keepdim=True) + read.config.rms_norm_eps).sqrt()
    torch.testing.assert_close(read.model.norm(x), scaled)


def test_frequencies_are_divided_by_the_factors_that_are_stored(tmp_path: Path) -> None:
    factors = np.array([1.0, 1.6513, 9.6667, 32.0], np.float32)

    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        metadata["llama.context_length"] = 20000
        tensors["rope_freqs.weight"] = (factors, "F32")

    model = GgufModel(changed(tmp_path, "llama", change))
    assert "rope_freqs.weight" not in dict(model.tensors())
    plain = 50000.0 ** -(torch.arange(0, 8, 2) / 8)
    rotary = float_model(model).model.rotary_emb
    for position in (9000, 3, 19999):
        cos, sin = rotary(torch.zeros(1), torch.tensor([[position]]))
        angles = position * (plain / torch.from_numpy(factors)).double()
        torch.testing.assert_close(cos[0, 0, :4].double(), angles.cos(), atol=2e-3, rtol=0)
        torch.testing.assert_close(sin[0, 0, :4].double(), angles.sin(), atol=2e-3, rtol=0)
    ours = quicksilver.load(tmp_path / "model.gguf")
    assert ours.adapter.spec.max_positions == 20000
    assert float((logits(ours) - logits(model_of("llama"))).abs().max()) > 0.001


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 3.0}, 3.0),  # so llama.cpp reads it
        ({"rope.scale_linear": 2.0}, 2.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 3.0}, 1.0),
    ],
)
def test_linear_scaling_divides_all_frequencies(tmp_path: Path, keys: dict[str, Any], factor: float) -> None:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        metadata.update({f"llama.{key}": value for key, value in keys.items()})

    rotary = float_model(GgufModel(changed(tmp_path, "llama", change))).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, 50000.0 ** -(torch.arange(0, 8, 2) / 8) / factor)


def test_yarn_is_applied_with_its_factor_of_attention(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 2.0}

    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        metadata.update({f"qwen2.rope.scaling.{key}": value for key, value in scaling.items()})

    model = float_model(GgufModel(changed(tmp_path, "qwen2", change)))
    rope = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    expected = tiny.from_config(Qwen2Config(**SIZES, rope_parameters=rope)).model.rotary_emb
    assert torch.equal(model.model.rotary_emb.inv_freq, expected.inv_freq)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(2 * expected.attention_scaling)


def test_layers_of_gemma_that_see_all_are_every_sixth_with_frequencies_of_their_own(tmp_path: Path) -> None:
    config = GgufModel(_whole(tmp_path, "gemma3")).config
    assert config.layer_types == GEMMA["layer_types"]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert (config.sliding_window, config.query_pre_attn_scalar, config.final_logit_softcapping) == (6, 12, None)

    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        more = {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 500.0, "final_logit_softcapping": 30.0}
        linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
        metadata.update({f"gemma3.{key}": value for key, value in (more | linear).items()})

    config = GgufModel(changed(tmp_path, "gemma3", change)).config
    assert [kind == "full_attention" for kind in config.layer_types] == [i % 2 == 1 for i in range(7)]
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 500.0}
    assert config.rope_parameters["full_attention"]["factor"] == 8.0  # of these layers only
    assert config.final_logit_softcapping == 30.0


def test_the_size_of_gemma_that_scales_scores_otherwise_is_known_by_its_layers(tmp_path: Path) -> None:
    config = Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 62, "layer_types": None, "query_pre_attn_scalar": 8})
    model = tiny.from_config(config)
    read = GgufModel(gguf_files.write_model(tmp_path / "model.gguf", model))
    assert read.config.query_pre_attn_scalar == 32 // 4


def test_a_missing_base_is_the_usual_one_only_where_all_models_have_it(tmp_path: Path) -> None:
    path = changed(tmp_path, "llama", lambda metadata, tensors: metadata.pop("llama.rope.freq_base"))
    assert GgufModel(path).config.rope_parameters["rope_theta"] == 10000.0
    path = changed(tmp_path, "qwen2", lambda metadata, tensors: metadata.pop("qwen2.rope.freq_base"))
    with pytest.raises(ModelError, match=r"model\.gguf: qwen2\.rope\.freq_base is missing"):
        GgufModel(path)


def test_sizes_that_metadata_leave_out_are_the_usual_ones(tmp_path: Path) -> None:
    def drop(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for key in ("attention.key_length", "attention.value_length"):
            del metadata[f"llama.{key}"]
        metadata["llama.rope.dimension_count"] = 8
        metadata["llama.attention.head_count"] = 4
        metadata["llama.attention.head_count_kv"] = [2, 2]  # one number a layer

    config = GgufModel(changed(tmp_path, "llama", drop)).config
    assert (config.head_dim, config.num_key_value_heads) == (8, 2)


def test_llama_files_have_no_window(tmp_path: Path) -> None:
    config = GgufModel(_whole(tmp_path, "mistral")).config
    assert getattr(config, "sliding_window", None) is None


def test_metadata_of_no_weight_are_ignored(tmp_path: Path) -> None:
    more = {"general.foo": 1, "quantize.imatrix.file": "x", "llama.vocab_size": 9, "llama.expert_count": 0}
    path = changed(tmp_path, "llama", lambda metadata, tensors: metadata.update(more))
    assert GgufModel(path).config.vocab_size == 60  # the rows of the embedding


def test_maps_of_gpt2_are_outputs_first_in_codes_and_in_floats(tmp_path: Path) -> None:
    blocks = random_blocks("Q8_0", 96, 1)
    path = changed(tmp_path, "gpt2", lambda m, tensors: tensors.update({"blk.0.attn_qkv.weight": (blocks, "Q8_0")}))
    model = GgufModel(path)
    read = dict(model.tensors())
    codes, up = read["transformer.h.0.attn.c_attn.weight"], read["transformer.h.0.mlp.c_fc.weight"]
    assert isinstance(codes, GroupedCodes)
    assert (codes.num_outputs, codes.num_inputs, tuple(torch.as_tensor(up).shape)) == (96, 32, (128, 32))
    weight = float_model(model).get_parameter("transformer.h.0.attn.c_attn.weight")
    assert torch.equal(weight, codes.dequantize().T)


def test_every_parameter_is_given_once_with_its_shape(tmp_path: Path) -> None:
    for name in CONFIGS:
        model = GgufModel(gguf_files.write_model(tmp_path / "model.gguf", model_of(name)))
        given = [(each, tuple(torch.as_tensor(tensor).shape)) for each, tensor in model.tensors()]
        assert dict(given) == model.shapes
        assert [each for each, _ in given] == [each for each, _ in model_of(name).named_parameters()]


LLAMA_CPP = {"smollm2-135m": 0.97, "qwen2.5-coder-0.5b": 0.97, "gemma3-270m": 0.96}
"""Least share of a text's tokens, 700 of them, that llama.cpp finds likeliest too; it rounds activations to 8 bits."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LLAMA_CPP)
def test_a_trained_model_predicts_what_llama_cpp_does(shared_dir: Path, name: str) -> None:
    """700 tokens are more than the window of Gemma 3 270M."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = GgufModel(gguf_files.real(name))
    text = (shared_dir / "data" / "text" / "wikitext103.test.detok.txt").read_text("utf-8")[:6000]
    ids = model.tokenizer()(text).input_ids[:700]
    theirs = llama_cpp.Llama(str(model.file.path), n_ctx=1024, logits_all=True, verbose=False)
    theirs.eval(ids)
    expected = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    ours = logits(float_model(model), torch.tensor([ids]))[0]
    agrees = expected.argmax(-1) == ours.argmax(-1)
    top = ours.topk(2, -1).values
    assert float(agrees.float().mean()) >= LLAMA_CPP[name]
    assert bool((top[:, 0] - top[:, 1])[~agrees].max() < 0.5)  # near ties
    theirs.close()
