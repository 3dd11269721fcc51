"""GGUF files written by the package `gguf`: of tiny models, of a few tensors, of vocabularies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quicksilver.loading.gguf.model import GgufModel
from quicksilver.measure.demo import ARTICLES

Types = gguf.GGMLQuantizationType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GEMMA_LAYER = {
    **_LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def write(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, str]], alignment: int | None = None
) -> Path:
    """Write a file.

    Args:
        path: of the file.
        metadata: values by key; whole numbers as uint32, others as their type says.
        tensors: arrays and types by name; of quantized types the blocks' bytes, [out, bytes] uint8.
        alignment: of tensors' data, None for what GGUF has.
    """
    values = {**metadata}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=Types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def describe(config: Any) -> dict[str, Any]:
    """Return the metadata of a transformers configuration without rotary scaling."""
    if config.model_type == "gpt2":
        return {
            "general.architecture": "gpt2",
            "gpt2.context_length": config.n_positions,
            "gpt2.embedding_length": config.n_embd,
            "gpt2.feed_forward_length": config.n_inner or 4 * config.n_embd,
            "gpt2.block_count": config.n_layer,
            "gpt2.attention.head_count": config.n_head,
            "gpt2.attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    name = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    }
    if name == "gemma3":
        found["attention.sliding_window"] = config.sliding_window
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in found.items()}}


def stored(model: Any) -> dict[str, tuple[np.ndarray, str]]:
    """Return a model's tensors in float32 under GGUF's names, in GGUF's order of rows."""
    config, found = model.config, {}
    layer_names = _GEMMA_LAYER if config.model_type == "gemma3_text" else _LAYER
    for path, parameter in model.named_parameters():
        module, _, kind = path.rpartition(".")
        tensor = parameter.detach().float()
        if module in _OUTSIDE:
            name = _OUTSIDE[module]
        else:
            _, _, index, inner = module.split(".", 3)
            name = f"blk.{index}.{layer_names[inner]}"
        if config.model_type == "gpt2" and tensor.dim() == 2 and name.startswith("blk"):
            tensor = tensor.T
        if config.model_type in ("llama", "mistral") and name.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if name.endswith("q") else config.num_key_value_heads
            tensor = pairs(tensor, heads)
        if config.model_type == "gemma3_text" and name.endswith("norm"):
            tensor = tensor + 1
        found[f"{name}.{kind}"] = (tensor.contiguous().numpy(), "F32")
    return found


def pairs(rows: Tensor, heads: int) -> Tensor:
    """Return the rows of heads, those that are rotated together side by side, as llama.cpp's converter does."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def write_model(path: Path, model: Any, **metadata: Any) -> Path:
    """Write a model in float32; metadata besides, `__` for a dot."""
    more = {key.replace("__", "."): value for key, value in metadata.items()}
    return write(path, {**describe(model.config), **more}, stored(model))


def random_blocks(kind: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Return random bytes [rows, bytes] of a quantized type, with scales from 1 to -1, many of them subnormal."""
    rng = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[Types[kind]][1]
    made = rng.integers(0, 256, (rows, blocks, size), np.uint8)
    halves = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2]}
    for begin in halves.get(kind, [208]):
        values = rng.uniform(-1, 1, (rows, blocks)) * 2.0 ** rng.integers(-26, 1, (rows, blocks))
        made[..., begin : begin + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    return made.reshape(rows, -1)


@cache
def trained_bpe() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return tokens and merges of a small byte-level vocabulary, trained on the package's articles."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    text = "".join(path.read_text("utf-8")[:1500] for path in sorted(ARTICLES.glob("*.txt"))[:8])
    made.train_from_iterator([text, "a  b   c\t\td    e  \n\n  f 1 12 123 2024 don't you'll  DON'T"] * 3, trainer)
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tuple(tokens), tuple(" ".join(pair) for pair in model["merges"])


def bpe(pre: str | None, added: Mapping[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """Return the metadata of a byte-level vocabulary.

    Args:
        pre: how texts are split, None to leave that open.
        added: kinds of further tokens by text.
        keys: others under `tokenizer.ggml`.
    """
    tokens, merges = trained_bpe()
    added = added or {}
    found = {
        "model": "gpt2",
        "tokens": [*tokens, *added],
        "token_type": [*[NORMAL] * len(tokens), *added.values()],
        "merges": list(merges),
        **({} if pre is None else {"pre": pre}),
        **keys,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def spm(pieces: Mapping[str, tuple[float, int]], **keys: Any) -> dict[str, Any]:
    """Return the metadata of a sentencepiece vocabulary: scores and kinds by text, bytes and controls before them."""
    fixed = {"<unk>": (0.0, UNKNOWN), "<s>": (0.0, CONTROL), "</s>": (0.0, CONTROL)}
    every = {**fixed, **{f"<0x{i:02X}>": (0.0, BYTE) for i in range(256)}, **pieces}
    found = {
        "model": "llama",
        "tokens": list(every),
        "scores": [float(score) for score, _ in every.values()],
        "token_type": [kind for _, kind in every.values()],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **keys,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def vocabulary_only(path: Path, vocabulary: Mapping[str, Any]) -> Path:
    """Write a file with a vocabulary and the least of a model, for what reads tokenizers only."""
    model = _least(len(vocabulary["tokenizer.ggml.tokens"]))
    return write(path, {**describe(model.config), **vocabulary}, stored(model))


def tokenizer_of(folder: Path, vocabulary: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a vocabulary, whose file is `model.gguf` in a folder."""
    return GgufModel(vocabulary_only(folder / "model.gguf", vocabulary)).tokenizer()


@cache
def _least(vocab_size: int) -> Any:
    config = LlamaConfig(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


REAL = {
    "smollm2-135m": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "gemma3-270m": "gemma-3-270m-q4_k_m.gguf",
}
"""Trained models, where somebody has put them: tests of them are skipped elsewhere."""


def real(name: str) -> Path:
    """Return the file of a trained model; skip the test where it is not there."""
    path = Path.home() / ".cache" / "quicksilver-real-models" / REAL[name]
    if not path.is_file():
        pytest.skip(f"{path} is not there: this trained model is not tested")
    return path
