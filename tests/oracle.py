"""The definition of halting and of each KV fill: every token through every layer, then masks decide.

Slow and dense on purpose. It shares nothing with the runtime but the policies' pure functions: layers are run
through transformers' own leaf modules, attention is written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quicksilver.core.rules import DropFill, KVFill, PropagateFill, ShareFill, ZeroFill

Halts = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
"""(layer, states before, states after, previous update), each [T, d], to which tokens would halt, [T] bool."""


class OracleRun(NamedTuple):
    """Logits [T, vocab], layers run by each token [T], and (query, key) pairs scored in each layer."""

    logits: Tensor
    depths: Tensor
    attended: list[int]


@torch.no_grad()
def run(model: Any, ids: Tensor, fill: KVFill, halts: Halts) -> OracleRun:
    """Run one sequence [T] and return what the mechanisms' definitions say it gives."""
    parts = _gpt2_parts(model, ids) if model.config.model_type == "gpt2" else _llama_parts(model, ids)
    hidden = parts.embedded
    running = torch.ones(len(ids), dtype=torch.bool)
    depths = torch.zeros(len(ids), dtype=torch.long)
    newest_key = newest_value = previous_update = None
    attended = []
    num_layers = len(parts.layers)
    for layer_idx, layer in enumerate(parts.layers):
        query, key, value = layer.qkv(hidden)  # [H, T, D], [Hkv, T, D]
        own_key, own_value = key, value
        halted = ~running
        if isinstance(fill, ZeroFill):
            key, value = key.clone(), value.clone()
            key[:, halted], value[:, halted] = 0.0, 0.0
        elif isinstance(fill, ShareFill) and newest_key is not None:
            key = torch.where(running[None, :, None], key, newest_key)
            value = torch.where(running[None, :, None], value, newest_value)
        else:
            assert isinstance(fill, DropFill | PropagateFill | ShareFill)
        listed = running if isinstance(fill, DropFill) else torch.ones_like(running)
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & listed[None, :]
        attended.append(int(mask[running].sum()))
        after = layer.finish(hidden, _attention(query, key, value, mask, layer.scaling))
        after = torch.where(running[:, None], after, hidden)
        depths += running
        if newest_key is None:
            newest_key, newest_value = own_key, own_value
        newest_key = torch.where(running[None, :, None], own_key, newest_key)
        newest_value = torch.where(running[None, :, None], own_value, newest_value)
        if layer_idx < num_layers - 1:
            running = running & ~halts(layer_idx, hidden, after, previous_update)
        previous_update, hidden = after - hidden, after
    return OracleRun(model.lm_head(parts.final_norm(hidden)), depths, attended)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Return attended values [T, H * D] of queries [H, T, D] over keys [Hkv, T, D] under mask [T, T]."""
    repeats = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    scores = (query @ key.transpose(1, 2)) * scaling
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a halted token may see nothing; its row is unused
    return (weights @ value).transpose(0, 1).flatten(1)


class _Layer(NamedTuple):
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    finish: Callable[[Tensor, Tensor], Tensor]
    scaling: float


class _Parts(NamedTuple):
    embedded: Tensor
    layers: list[_Layer]
    final_norm: Callable[[Tensor], Tensor]


def _gpt2_parts(model: Any, ids: Tensor) -> _Parts:
    body = model.transformer

    def layer(block: Any) -> _Layer:
        def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            parts = block.attn.c_attn(block.ln_1(x)).split(block.attn.split_size, dim=1)
            query, key, value = (
                p.view(len(x), block.attn.num_heads, block.attn.head_dim).transpose(0, 1) for p in parts
            )
            return query, key, value

        def finish(x: Tensor, attended: Tensor) -> Tensor:
            x = x + block.attn.c_proj(attended)
            return x + block.mlp(block.ln_2(x))

        return _Layer(qkv, finish, block.attn.scaling)

    embedded = body.wte(ids) + body.wpe(torch.arange(len(ids)))
    return _Parts(embedded, [layer(block) for block in body.h], body.ln_f)


def _llama_parts(model: Any, ids: Tensor) -> _Parts:
    body = model.model
    embedded = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(embedded[None], torch.arange(len(ids))[None])

    def layer(block: Any) -> _Layer:
        attention = block.self_attn

        def heads(x: Tensor, norm: Any = None) -> Tensor:
            x = x.view(len(x), -1, attention.head_dim)
            return (x if norm is None else norm(x)).transpose(0, 1)

        def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = block.input_layernorm(x)
            query = heads(attention.q_proj(x), getattr(attention, "q_norm", None))
            key = heads(attention.k_proj(x), getattr(attention, "k_norm", None))
            query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin)
            return query[0], key[0], heads(attention.v_proj(x))

        def finish(x: Tensor, attended: Tensor) -> Tensor:
            x = x + attention.o_proj(attended)
            return x + block.mlp(block.post_attention_layernorm(x))

        return _Layer(qkv, finish, attention.scaling)

    return _Parts(embedded, [layer(block) for block in body.layers], body.norm)
