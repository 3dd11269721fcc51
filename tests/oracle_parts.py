"""Layers of transformers' models for `oracle.py`: their own leaf modules, put together as each family defines it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quicksilver.weights import AnyPrecisionSplit

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
        window: keys that a query sees, itself included; None where all before it.
        softcap: bound of scores, None where there is none.
    """

    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    attn_norm: Callable[[Tensor], Tensor]
    attn_output: Callable[[Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    scaling: float
    window: int | None = None
    softcap: float | None = None


class Parts(NamedTuple):
    """A model around the states of one sequence: embeddings [T, d], layers, and the logits of its last states."""

    embedded: Tensor
    layers: list[Layer]
    logits: Callable[[Tensor], Tensor]


def parts_of(model: Any, ids: Tensor, read: Read) -> Parts:
    """Return the parts of a GPT-2 or of a model like Llama, for a sequence [T] whose linear maps `read` applies."""
    return (_gpt2_parts if model.config.model_type == "gpt2" else _llama_parts)(model, ids, read)


def linear_maps(model: Any, layer_idx: int) -> list[Any]:
    """Return the modules of a quantized layer's maps, in the order of plans: query, key, value, output, MLP."""
    if model.config.model_type == "gpt2":
        block = model.transformer.h[layer_idx]
        return [*block.attn.c_attn.parts, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
    block = model.model.layers[layer_idx]
    attn, mlp = block.self_attn, block.mlp
    if model.config.model_type == "phi3":
        return [*attn.qkv_proj.parts, attn.o_proj, *mlp.gate_up_proj.parts, mlp.down_proj]
    return [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Return what a model makes of states [T, d] that leave its last layer, [T, vocab]."""
    config = model.config
    norm = model.transformer.ln_f if config.model_type == "gpt2" else model.model.norm
    scores = model.lm_head(norm(hidden)) / getattr(config, "logits_scaling", 1.0)
    bound = getattr(config, "final_logit_softcapping", None)
    return scores if bound is None else torch.tanh(scores / bound) * bound


def head_entropy(model: Any, hidden: Tensor) -> Tensor:
    """Return the entropy of what a model predicts from states [T, d], [T], in bits."""
    probs = torch.softmax(logits_of(model, hidden).float(), dim=-1)
    return -(probs * probs.log2()).sum(-1)


def _gpt2_parts(model: Any, ids: Tensor, read: Read) -> Parts:
    body = model.transformer

    def layer(layer_idx: int, block: Any) -> Layer:
        apply = partial(read, layer_idx)

        def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            c_attn, normed = block.attn.c_attn, block.ln_1(x)
            if isinstance(c_attn, AnyPrecisionSplit):
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
    return Parts(embedded, [layer(i, block) for i, block in enumerate(body.h)], partial(logits_of, model))


def _llama_parts(model: Any, ids: Tensor, read: Read) -> Parts:
    body, config = model.model, model.config
    embedded = body.embed_tokens(ids) * getattr(config, "embedding_multiplier", 1.0)
    if config.model_type == "gemma2" and not hasattr(modeling_gemma2, "Gemma2TextScaledWordEmbedding"):
        embedded = embedded * config.hidden_size**0.5
    positions = torch.arange(len(ids))[None]

    def layer(layer_idx: int, block: Any) -> Layer:
        attention, apply = block.self_attn, partial(read, layer_idx)
        rotates = getattr(attention, "use_rope", True)
        kind = (config.layer_types[layer_idx],) if "rope_type" not in config.rope_parameters else ()
        cos, sin = body.rotary_emb(embedded[None], positions, *kind)
        norms, scale = _norms(block), getattr(block, "residual_multiplier", 1.0)

        def heads(x: Tensor, norm: Any = None) -> Tensor:
            whole = norm is not None and norm.weight.numel() != attention.head_dim  # over all heads together
            x = (norm(x) if whole else x).view(len(x), -1, attention.head_dim)
            return (x if norm is None or whole else norm(x)).transpose(0, 1)

        def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = _products(attention, ("q_proj", "k_proj", "v_proj"), norms[0](x), apply)
            query, key = (
                heads(query, getattr(attention, "q_norm", None)),
                heads(key, getattr(attention, "k_norm", None)),
            )
            if rotates:
                query, key = (x[0] for x in apply_rotary_pos_emb(query[None], key[None], cos, sin))
            return query, key, heads(value)

        def output(x: Tensor) -> Tensor:
            return norms[1](apply(attention.o_proj, x)) * scale

        def mlp(normed: Tensor) -> Tensor:
            activation = block.mlp.activation_fn if hasattr(block.mlp, "activation_fn") else block.mlp.act_fn
            gate, up = _products(block.mlp, ("gate_proj", "up_proj"), normed, apply)
            return norms[3](apply(block.mlp.down_proj, activation(gate) * up)) * scale

        of_all = config.sliding_window if config.model_type in ("mistral", "phi3") else None
        window, softcap = getattr(attention, "sliding_window", of_all), None
        if config.model_type == "gemma2":
            softcap = attention.attn_logit_softcapping
        return Layer(qkv, norms[0], output, norms[2], mlp, attention.scaling, window, softcap)

    return Parts(embedded, [layer(i, block) for i, block in enumerate(body.layers)], partial(logits_of, model))


def _norms(block: Any) -> tuple[Any, Any, Any, Any]:
    """Return a layer's norms before and behind attention, before and behind the MLP."""
    same = torch.nn.Identity()
    behind = getattr(block, "post_feedforward_layernorm", None)
    if behind is None:
        return block.input_layernorm, same, block.post_attention_layernorm, same
    before = getattr(block, "input_layernorm", same), getattr(block, "pre_feedforward_layernorm", same)
    return before[0], block.post_attention_layernorm, before[1], behind


def _products(module: Any, names: tuple[str, ...], x: Tensor, apply: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
    """Return what maps of one input give; Phi-3 keeps them in one module."""
    if hasattr(module, names[0]):
        return [apply(getattr(module, name), x) for name in names]
    fused = module.qkv_proj if len(names) == 3 else module.gate_up_proj
    if isinstance(fused, AnyPrecisionSplit):
        return [apply(part, x) for part in fused.parts]
    queries = module.config.num_attention_heads * module.head_dim if len(names) == 3 else 0
    y = apply(fused, x)
    return [y[:, :queries], *y[:, queries:].chunk(2, dim=1)] if queries else [*y.chunk(2, dim=1)]
