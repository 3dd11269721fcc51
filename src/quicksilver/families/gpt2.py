"""GPT-2: learned positions, LayerNorm, one fused projection, a plain MLP."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.errors import UnsupportedModelError
from quicksilver.families.kernels import activation_name
from quicksilver.families.modules import ModuleLayout, float_weight, is_observed, runs_only
from quicksilver.families.spec import (
    QKV,
    Adapter,
    Apply,
    LayerOps,
    Leaves,
    MapRole,
    ModelSpec,
    head_bits,
    nested_bytes,
    nested_maps,
    num_parameters,
    weight_bytes,
)
from quicksilver.quant import NestedSplit

_ROLES: tuple[MapRole, ...] = ("query", "key", "value", "output", "up", "down")
_CONV1D = "transformers.pytorch_utils"

MODULES = ModuleLayout(
    run={
        "": "GPT2LMHeadModel",
        "transformer": "GPT2Model",
        "transformer.drop": "",
        "transformer.h": "",
        "transformer.h.*": "GPT2Block",
        "transformer.h.*.attn": "GPT2Attention",
        "transformer.h.*.attn.attn_dropout": "",
        "transformer.h.*.attn.resid_dropout": "",
        "transformer.h.*.mlp": "GPT2MLP",
        "transformer.h.*.mlp.dropout": "",
    },
    maps=(
        "transformer.h.*.attn.c_attn",
        "transformer.h.*.attn.c_proj",
        "transformer.h.*.mlp.c_fc",
        "transformer.h.*.mlp.c_proj",
    ),
    called=(
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.*.ln_1",
        "transformer.h.*.ln_2",
        "transformer.h.*.mlp.act",
        "transformer.ln_f",
        "lm_head",
    ),
)


def adapt(model: Any) -> Adapter:
    """Read a GPT-2 model of transformers.

    Raises:
        UnsupportedModelError: the configuration asks for something not implemented here.
    """
    if model.config.add_cross_attention:
        raise UnsupportedModelError("gpt2: cross-attention (add_cross_attention=True) is not supported")
    body = model.transformer
    return Adapter(
        spec=_spec(model),
        layers=tuple(_layer_ops(block) for block in body.h),
        embed=partial(_embed, body),
        rotation=None,
        final_norm=body.ln_f,
        head=model.lm_head,
    )


def _spec(model: Any) -> ModelSpec:
    config, body = model.config, model.transformer
    d = config.n_embd
    inner = config.n_inner if config.n_inner is not None else 4 * d
    c_attn, like = body.h[0].attn.c_attn, float_weight(body.ln_f, body)
    return ModelSpec(
        family=config.model_type,
        num_layers=config.n_layer,
        hidden_size=d,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=d // config.n_head,
        vocab_size=config.vocab_size,
        max_positions=config.n_positions,
        layer_macs=4 * d * d + 2 * d * inner,
        kv_macs=2 * d * d,
        query_macs=2 * d * d,
        mlp_macs=2 * d * inner,
        head_macs=d * config.vocab_size,
        layer_weight_bytes=weight_bytes(body.h[0]),
        kv_weight_bytes=weight_bytes(c_attn) * 2 // 3,
        query_weight_bytes=weight_bytes(c_attn) // 3 + weight_bytes(body.h[0].attn.c_proj),
        mlp_weight_bytes=weight_bytes(body.h[0].mlp),
        nested_weight_bytes=nested_bytes(body.h[0]),
        head_weight_bytes=weight_bytes(model.lm_head, body.ln_f) + nested_bytes(model.lm_head),
        head_bits=head_bits(model.lm_head, like.dtype),
        parameters=num_parameters(model),
        dtype=like.dtype,
        device=like.device,
    )


def _layer_ops(block: Any) -> LayerOps:
    attention = block.attn
    heads, head_dim, nested = attention.num_heads, attention.head_dim, isinstance(attention.c_attn, NestedSplit)
    project_qkv, project_kv, project_query = (
        (_split_qkv, _split_kv, _split_query) if nested else (_fused_qkv, _fused_kv, _fused_query)
    )
    return LayerOps(
        attn_norm=block.ln_1,
        project_qkv=partial(project_qkv, attention.c_attn, heads, head_dim),
        project_kv=partial(project_kv, attention.c_attn, heads, head_dim),
        project_query=partial(project_query, attention.c_attn, heads, head_dim),
        attn_output=partial(_attn_output, attention),
        mlp_norm=block.ln_2,
        mlp=partial(_mlp, block.mlp),
        scaling=_scaling(attention),
        nested=nested_maps(block),
        leaves=Leaves(block.ln_1, block.ln_2, None, None, _ROLES, block.mlp.act),
    )


def _scaling(attention: Any) -> float:
    """Return the factor of a layer's attention scores; transformers 5.0 keeps its parts, later releases itself."""
    scaling = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    return scaling / (attention.layer_idx + 1) if attention.scale_attn_by_inverse_layer_idx else scaling


def _embed(body: Any, ids: Tensor, positions: Tensor) -> Tensor:
    return body.wte(ids) + body.wpe(positions)


def _attn_output(attention: Any, x: Tensor, apply: Apply) -> Tensor:
    return apply(attention.c_proj, x)


def _mlp(mlp: Any, x: Tensor, apply: Apply) -> Tensor:
    return apply(mlp.c_proj, _activate(mlp.act, apply(mlp.c_fc, x)))


def _activate(activation: Any, x: Tensor) -> Tensor:
    """Apply the activation; the tanh GELUs as PyTorch's fused one, the same formula in one pass."""
    if activation_name(activation) == "gelu_tanh" and not is_observed(activation):
        return F.gelu(x, approximate="tanh")
    return activation(x)


def _fused_qkv(c_attn: Any, heads: int, head_dim: int, x: Tensor, apply: Apply) -> QKV:
    return QKV(*apply(c_attn, x).view(-1, 3, heads, head_dim).unbind(1))


def _fused_kv(c_attn: Any, heads: int, head_dim: int, x: Tensor, apply: Apply) -> tuple[Tensor, Tensor]:
    if not runs_only(c_attn, _CONV1D):  # an adapter, say: what it makes of keys and values, only the whole map knows
        _, key, value = _fused_qkv(c_attn, heads, head_dim, x, apply)
        return key, value
    d = heads * head_dim
    fused = torch.addmm(c_attn.bias[d:], x, c_attn.weight[:, d:]).view(-1, 2, heads, head_dim)
    return fused[:, 0], fused[:, 1]


def _fused_query(c_attn: Any, heads: int, head_dim: int, x: Tensor, apply: Apply) -> Tensor:
    if not runs_only(c_attn, _CONV1D):
        return _fused_qkv(c_attn, heads, head_dim, x, apply).query
    d = heads * head_dim
    return torch.addmm(c_attn.bias[:d], x, c_attn.weight[:, :d]).view(-1, heads, head_dim)


def _split_qkv(c_attn: NestedSplit, heads: int, head_dim: int, x: Tensor, apply: Apply) -> QKV:
    return QKV(*(apply(part, x).view(-1, heads, head_dim) for part in c_attn.parts))


def _split_kv(c_attn: NestedSplit, heads: int, head_dim: int, x: Tensor, apply: Apply) -> tuple[Tensor, Tensor]:
    key, value = (apply(part, x).view(-1, heads, head_dim) for part in c_attn.parts[1:])
    return key, value


def _split_query(c_attn: NestedSplit, heads: int, head_dim: int, x: Tensor, apply: Apply) -> Tensor:
    return apply(c_attn.parts[0], x).view(-1, heads, head_dim)
