"""Layers of transformers' models for `oracle.py`: their own leaf modules, put together as each family defines it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quicksilver.quant import NestedSplit

Read = Callable[[int, Any, Tensor], Tensor]
"""(layer, a linear map's module, its inputs [T, in]) to its outputs [T, out]."""


class Layer(NamedTuple):
    """A layer by its leaf modules; T tokens of one sequence.

    Attributes:
        qkv: states [T, d] to queries [H, T, D], keys and values [Hkv, T, D].
        attn_norm: before attention.
        attn_output: weighted values [T, H * D] to what is added to the states.
        mlp_norm: before the MLP.
        mlp: normed states to what is added to the states.
        scaling: of scores.
    """

    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    attn_norm: Callable[[Tensor], Tensor]
    attn_output: Callable[[Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    scaling: float


class Parts(NamedTuple):
    """A model around the states of one sequence: embeddings [T, d], layers, and the norm before the head."""

    embedded: Tensor
    layers: list[Layer]
    final_norm: Callable[[Tensor], Tensor]


def parts_of(model: Any, ids: Tensor, read: Read) -> Parts:
    """Return a GPT-2's or a Llama's parts, for a sequence [T] whose linear maps `read` applies."""
    return (_gpt2_parts if model.config.model_type == "gpt2" else _llama_parts)(model, ids, read)


def linear_maps(model: Any, layer_idx: int) -> list[Any]:
    """Return the modules of a nested layer's maps, in the order of plans: query, key, value, output, MLP."""
    if model.config.model_type == "gpt2":
        block = model.transformer.h[layer_idx]
        return [*block.attn.c_attn.parts, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
    block = model.model.layers[layer_idx]
    attn, mlp = block.self_attn, block.mlp
    return [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _gpt2_parts(model: Any, ids: Tensor, read: Read) -> Parts:
    body = model.transformer

    def layer(layer_idx: int, block: Any) -> Layer:
        apply = partial(read, layer_idx)

        def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            c_attn, normed = block.attn.c_attn, block.ln_1(x)
            if isinstance(c_attn, NestedSplit):
                parts = [apply(part, normed) for part in c_attn.parts]
            else:
                parts = c_attn(normed).split(block.attn.split_size, dim=1)
            query, key, value = (
                p.view(len(x), block.attn.num_heads, block.attn.head_dim).transpose(0, 1) for p in parts
            )
            return query, key, value

        def mlp(normed: Tensor) -> Tensor:
            return apply(block.mlp.c_proj, block.mlp.act(apply(block.mlp.c_fc, normed)))

        output = partial(apply, block.attn.c_proj)
        return Layer(qkv, block.ln_1, output, block.ln_2, mlp, block.attn.scaling)

    embedded = body.wte(ids) + body.wpe(torch.arange(len(ids)))
    return Parts(embedded, [layer(i, block) for i, block in enumerate(body.h)], body.ln_f)


def _llama_parts(model: Any, ids: Tensor, read: Read) -> Parts:
    body = model.model
    embedded = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(embedded[None], torch.arange(len(ids))[None])

    def layer(layer_idx: int, block: Any) -> Layer:
        attention, apply = block.self_attn, partial(read, layer_idx)

        def heads(x: Tensor, norm: Any = None) -> Tensor:
            x = x.view(len(x), -1, attention.head_dim)
            return (x if norm is None else norm(x)).transpose(0, 1)

        def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = block.input_layernorm(x)
            query = heads(apply(attention.q_proj, x), getattr(attention, "q_norm", None))
            key = heads(apply(attention.k_proj, x), getattr(attention, "k_norm", None))
            query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin)
            return query[0], key[0], heads(apply(attention.v_proj, x))

        def mlp(normed: Tensor) -> Tensor:
            gated = block.mlp.act_fn(apply(block.mlp.gate_proj, normed)) * apply(block.mlp.up_proj, normed)
            return apply(block.mlp.down_proj, gated)

        norms, output = (block.input_layernorm, block.post_attention_layernorm), partial(apply, attention.o_proj)
        return Layer(qkv, norms[0], output, norms[1], mlp, attention.scaling)

    return Parts(embedded, [layer(i, block) for i, block in enumerate(body.layers)], body.norm)
