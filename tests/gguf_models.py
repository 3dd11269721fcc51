"""Tiny models that GGUF files can hold, and their files after a change."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests import tiny
from tests.gguf_files import describe, stored, write

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 128,
}
_ROPE = {"rope_type": "default", "rope_theta": 50000.0}
_GEMMA_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA = {
    **SIZES,
    "num_hidden_layers": 7,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": 6,
    "rope_parameters": _GEMMA_ROPE,
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, rope_parameters=_ROPE),
    "llama, tied": lambda: LlamaConfig(**SIZES, rope_parameters=_ROPE, tie_word_embeddings=True),
    "llama, biased": lambda: LlamaConfig(**SIZES, rope_parameters=_ROPE, attention_bias=True, mlp_bias=True),
    "llama, wide heads": lambda: LlamaConfig(**SIZES, rope_parameters=_ROPE, head_dim=16),
    "mistral": lambda: MistralConfig(**SIZES, rope_parameters=_ROPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, rope_parameters=_ROPE),
    "qwen2, tied": lambda: Qwen2Config(**SIZES, rope_parameters=_ROPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, rope_parameters=_ROPE, head_dim=20),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA),
    "gpt2": lambda: GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=128, vocab_size=60),
    "gpt2, untied": lambda: GPT2Config(
        n_embd=32, n_head=4, n_layer=2, n_inner=48, n_positions=128, vocab_size=60, tie_word_embeddings=False
    ),
}
ROTATED = ("llama", "qwen2", "qwen3", "gemma3")
IDS = torch.tensor([[5, 9, 2, 44, 17, 30, 8, 21, 59, 3, 3, 12, 40, 1]])


@cache
def model_of(name: str) -> Any:
    return tiny.from_config(CONFIGS[name]())


def changed(path: Path, name: str, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """Write a model's file after its metadata and tensors have been changed."""
    metadata, tensors = describe(model_of(name).config), stored(model_of(name))
    change(metadata, tensors)
    return write(path / "model.gguf", metadata, tensors)
