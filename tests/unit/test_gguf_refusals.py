"""What in a GGUF file may change what its model computes, and is not known, is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.loading.gguf.model import GgufModel, float_model
from tests.gguf_models import changed


def _set(name: str, **values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        metadata.update({f"{name}.{key.replace('__', '.')}": value for key, value in values.items()})

    return change


def _add(name: str, *shape: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[name] = (np.ones(shape, np.float32), "F32")

    return change


def _drop(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        (tensors if name in tensors else metadata).pop(name)

    return change


def _architecture(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda metadata, tensors: metadata.update({"general.architecture": name})


REFUSED: dict[str, tuple[str, Any, str]] = {
    "no rope in some layers": ("llama", _architecture("smollm3"), "architecture 'smollm3' is not supported"),
    "another architecture": ("llama", _architecture("mamba"), "architecture 'mamba' is not supported"),
    "experts": ("llama", _set("llama", expert_count=8), r"llama\.expert_count = 8 is not supported"),
    "an unknown key": ("llama", _set("llama", residual_scale=2.0), r"llama\.residual_scale = 2\.0 is not known"),
    "a soft cap": ("qwen2", _set("qwen2", attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0 is not known"),
    "a window": ("llama", _set("llama", attention__sliding_window=8), "attention.sliding_window = 8 is not known"),
    "both ways": ("llama", _set("llama", attention__causal=False), "attention.causal = False is not supported"),
    "heads in part": ("llama", _set("llama", rope__dimension_count=4), "rope.dimension_count = 4 is not supported"),
    "short values": ("llama", _set("llama", attention__value_length=4), "value_length = 4 is not supported"),
    "unlike layers": ("llama", _set("llama", feed_forward_length=[64, 32]), "layers that differ are not supported"),
    "an unknown scaling": ("llama", _set("llama", rope__scaling__type="su"), "rope.scaling.type = 'su'"),
    "another scaling": ("llama", _set("llama", rope__scaling__type="longrope"), "rope.scaling.type = 'longrope'"),
    "a scaling of no factor": ("llama", _set("llama", rope__scaling__type="linear"), "rope.scaling.factor is missing"),
    "no extrapolation": (
        "llama",
        _set("llama", rope__scaling__type="yarn", rope__scaling__factor=2.0, rope__scaling__yarn_ext_factor=0.5),
        "yarn_ext_factor = 0.5",
    ),
    "an unknown tensor": ("llama", _add("blk.0.ffn_gate_inp.weight", 2, 32), r"blk\.0\.ffn_gate_inp\.weight: "),
    "an unknown tensor outside": ("llama", _add("rope_factors_long.weight", 4), "rope_factors_long.weight: "),
    "a bias of no place": ("qwen2", _add("blk.0.attn_output.bias", 32), r"blk\.0\.attn_output\.bias: "),
    "a layer too many": ("llama", _add("blk.2.attn_norm.weight", 32), r"blk\.2\.attn_norm\.weight: "),
    "a norm of heads": ("llama", _add("blk.0.attn_q_norm.weight", 8), r"blk\.0\.attn_q_norm\.weight: "),
    "a picture's tensor": ("gemma3", _add("mm.input_projection.weight", 2, 2), "mm.input_projection.weight: "),
    "twice": ("llama", _add("blk.0.attn_qkv.weight", 64, 32), "are both model.layers.0.self_attn"),
    "a missing tensor": ("llama", _drop("blk.1.ffn_up.weight"), r"no tensor for model\.layers\.1\.mlp\.up_proj"),
    "a missing norm": ("qwen3", _drop("blk.0.attn_q_norm.weight"), "no tensor for model.layers.0.self_attn.q_norm"),
    "no embedding": ("llama", _drop("token_embd.weight"), "token_embd.weight, the token embedding, is missing"),
    "a missing key": ("llama", _drop("llama.block_count"), r"llama\.block_count is missing"),
    "a count of none": ("llama", _set("llama", block_count=0), r"llama\.block_count is 0, not a whole number above 0"),
    "a count of words": ("llama", _set("llama", block_count="two"), r"llama\.block_count is 'two'"),
    "a base of none": ("llama", _set("llama", rope__freq_base=0.0), r"llama\.rope\.freq_base is 0\.0"),
    "too few heads": ("llama", _set("llama", attention__head_count=2), r"blk\.0\.attn_q\.weight is \[32, 32\]"),
    "odd heads": ("llama", _set("llama", attention__key_length=7, attention__value_length=7), "heads of 7"),
    "tokens of numbers": ("llama", _set("tokenizer.ggml", tokens=[1, 2]), "tokens are no list of texts"),
    "one token": ("llama", _set("tokenizer.ggml", tokens=7), "tokens are no list of texts"),
    "endless layers": ("llama", _set("llama", block_count=2**32 - 1), "tensors are too few for 4294967295 layers"),
    "too many tokens": ("llama", _set("tokenizer.ggml", tokens=["x"] * 61), "has 60 rows, and there are 61 tokens"),
    "factors for others": ("gpt2", _add("rope_freqs.weight", 4), "rope_freqs.weight"),
    "factors and scaling": (
        "llama",
        lambda m, t: (_set("llama", rope__scaling__type="yarn")(m, t), _add("rope_freqs.weight", 4)(m, t)),
        "rope_freqs.weight beside",
    ),
    "too few factors": ("llama", _add("rope_freqs.weight", 3), "rope_freqs.weight holds 3 factors for heads of 8"),
    "an odd shape": ("llama", lambda m, t: t.update({"blk.0.ffn_up.weight": t["blk.0.ffn_down.weight"]}), "ffn_up"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_change_what_is_computed_is_refused_by_name(tmp_path: Path, case: str) -> None:
    name, change, reason = REFUSED[case]
    with pytest.raises(ModelError, match=rf"model\.gguf: .*{reason}") as caught:
        float_model(GgufModel(changed(tmp_path, name, change)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("model.gguf") == 1


def test_unsupported_is_told_apart_from_damaged(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        GgufModel(changed(tmp_path, "llama", _architecture("mamba")))
