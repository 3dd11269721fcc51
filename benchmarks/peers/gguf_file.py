"""GPT-2 and Llama weights as GGUF, written tensor by tensor and quantized by llama.cpp's own quantizer.

Token ids go in and logits come out, so the file holds no tokenizer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.llama_cpp_engine import library

Change = Callable[[Tensor], Tensor]


class Place(NamedTuple):
    """Where a GGUF tensor comes from: a path in the transformers model, and what is done to it."""

    name: str
    path: str
    change: Change | None = None


def write_gguf(folder: Path, target: Path) -> None:
    """Write a model's floats: matrices in its own dtype, vectors and positions in float32.

    Args:
        folder: a GPT-2 or Llama model as transformers reads it.
        target: file to write.

    Raises:
        ValueError: another family.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    config, family = model.config, model.config.model_type
    if family not in ("gpt2", "llama"):
        raise ValueError(f"{folder}: a GGUF file can be written of gpt2 and llama models, not of {family}")
    writer = gguf.GGUFWriter(str(target), family)
    _describe(writer, config)
    places = list(_gpt2_places(config) if family == "gpt2" else _llama_places(config))
    tensors = {place.name: _array(model, place) for place in places}
    for name, array in tensors.items():
        raw = gguf.GGMLQuantizationType.BF16 if array.dtype == np.uint8 else None
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in tensors.values():
        writer.write_tensor_data(np.ascontiguousarray(array))
    writer.close()


def quantize(source: Path, file_type: int, threads: int, target: Path) -> None:
    """Quantize a GGUF file as `llama-quantize` does with its defaults.

    Args:
        source: float file.
        file_type: llama.cpp's `llama_ftype`.
        threads: CPU threads.
        target: file to write.

    Raises:
        RuntimeError: llama.cpp refused.
    """
    lib, _ = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, threads
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp did not quantize {source}")


def _describe(writer: Any, config: Any) -> None:
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rotary scaling {rope['rope_type']!r} is not written to GGUF here")
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _gpt2_places(config: Any) -> Iterator[Place]:
    def transposed(weight: Tensor) -> Tensor:
        return weight.T

    yield Place("token_embd.weight", "transformer.wte.weight")
    yield Place("position_embd.weight", "transformer.wpe.weight", Tensor.float)
    yield from _both("output_norm", "transformer.ln_f")
    for i in range(config.n_layer):
        block, layer = f"blk.{i}", f"transformer.h.{i}"
        yield from _both(f"{block}.attn_norm", f"{layer}.ln_1")
        yield from _both(f"{block}.attn_qkv", f"{layer}.attn.c_attn", transposed)
        yield from _both(f"{block}.attn_output", f"{layer}.attn.c_proj", transposed)
        yield from _both(f"{block}.ffn_norm", f"{layer}.ln_2")
        yield from _both(f"{block}.ffn_up", f"{layer}.mlp.c_fc", transposed)
        yield from _both(f"{block}.ffn_down", f"{layer}.mlp.c_proj", transposed)


def _both(name: str, path: str, change: Change | None = None) -> Iterator[Place]:
    yield Place(f"{name}.weight", f"{path}.weight", change)
    yield Place(f"{name}.bias", f"{path}.bias")


def _llama_places(config: Any) -> Iterator[Place]:
    def paired(heads: int) -> Change:
        """Rotary halves, as transformers keeps them, to the neighbouring pairs that llama.cpp rotates."""
        return lambda weight: weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    yield Place("token_embd.weight", "model.embed_tokens.weight")
    yield Place("output_norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield Place("output.weight", "lm_head.weight")
    for i in range(config.num_hidden_layers):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        yield Place(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight")
        yield Place(f"{block}.attn_q.weight", f"{layer}.self_attn.q_proj.weight", paired(config.num_attention_heads))
        yield Place(f"{block}.attn_k.weight", f"{layer}.self_attn.k_proj.weight", paired(config.num_key_value_heads))
        yield Place(f"{block}.attn_v.weight", f"{layer}.self_attn.v_proj.weight")
        yield Place(f"{block}.attn_output.weight", f"{layer}.self_attn.o_proj.weight")
        yield Place(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight")
        yield Place(f"{block}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight")
        yield Place(f"{block}.ffn_up.weight", f"{layer}.mlp.up_proj.weight")
        yield Place(f"{block}.ffn_down.weight", f"{layer}.mlp.down_proj.weight")


def _array(model: Any, place: Place) -> np.ndarray:
    """Return a tensor as GGUF stores it: bfloat16 as bytes [..., 2 * n] uint8."""
    tensor = model.get_parameter(place.path).detach()
    tensor = tensor if place.change is None else place.change(tensor)
    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        return tensor.float().numpy()
    if tensor.dtype != torch.bfloat16:
        return tensor.half().numpy()
    return tensor.contiguous().view(torch.uint8).numpy()
