"""GPT-2: learned positions, LayerNorm, one fused projection, a plain MLP."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.errors import UnsupportedModelError
from quicksilver.models.spec import QKV, Adapter, LayerOps, Map, ModelSpec, weight_bytes

_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


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
        layers=tuple(_layer_ops(block, model.config.activation_function) for block in body.h),
        embed=lambda ids, positions: body.wte(ids) + body.wpe(positions),
        rotation=None,
        final_norm=body.ln_f,
        head=model.lm_head,
    )


def _spec(model: Any) -> ModelSpec:
    config, body = model.config, model.transformer
    d = config.n_embd
    inner = config.n_inner if config.n_inner is not None else 4 * d
    attention = body.h[0].attn
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
        head_macs=d * config.vocab_size,
        layer_weight_bytes=weight_bytes(body.h[0]),
        kv_weight_bytes=weight_bytes(attention.c_attn) * 2 // 3,
        head_weight_bytes=weight_bytes(model.lm_head, body.ln_f),
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=body.wte.weight.dtype,
        device=body.wte.weight.device,
    )


def _layer_ops(block: Any, activation: str) -> LayerOps:
    attention = block.attn
    heads, head_dim = attention.num_heads, attention.head_dim
    return LayerOps(
        attn_norm=block.ln_1,
        project_qkv=partial(_project_qkv, attention.c_attn, heads, head_dim),
        project_kv=partial(_project_kv, attention.c_attn, heads, head_dim),
        attn_output=partial(_conv1d, attention.c_proj),
        mlp_norm=block.ln_2,
        mlp=partial(_mlp, block.mlp, _activation(block.mlp, activation)),
        scaling=attention.scaling,
    )


def _activation(mlp: Any, name: str) -> Map:
    """Return the activation; the tanh GELUs as PyTorch's fused one, the same formula in one pass."""
    return partial(F.gelu, approximate="tanh") if name in _TANH_GELUS else mlp.act


def _conv1d(layer: Any, x: Tensor) -> Tensor:
    """Apply transformers' Conv1D (weight [in, out]) to rows [N, in]."""
    return torch.addmm(layer.bias, x, layer.weight)


def _mlp(mlp: Any, activation: Map, x: Tensor) -> Tensor:
    return _conv1d(mlp.c_proj, activation(_conv1d(mlp.c_fc, x)))


def _project_qkv(c_attn: Any, heads: int, head_dim: int, x: Tensor) -> QKV:
    return QKV(*_conv1d(c_attn, x).view(-1, 3, heads, head_dim).unbind(1))


def _project_kv(c_attn: Any, heads: int, head_dim: int, x: Tensor) -> tuple[Tensor, Tensor]:
    d = heads * head_dim
    fused = torch.addmm(c_attn.bias[d:], x, c_attn.weight[:, d:]).view(-1, 2, heads, head_dim)
    return fused[:, 0], fused[:, 1]
