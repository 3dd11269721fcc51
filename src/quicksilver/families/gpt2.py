"""GPT-2: learned positions, LayerNorm, one fused projection, a plain MLP."""

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from quicksilver.errors import UnsupportedModelError
from quicksilver.families.family import Family, MapRole, MapShape
from quicksilver.families.fused import apply_parts
from quicksilver.families.kernels import activation_name
from quicksilver.families.modules import is_observed
from quicksilver.families.spec import (
    Adapter,
    Apply,
    LayerOps,
    LayerSpec,
    ModelSpec,
    layer_spec,
    model_spec,
    quantized_maps,
)
from quicksilver.families.windows import layer_windows


def _adapt(model: Any) -> Adapter:
    """Read a GPT-2 model of transformers."""
    if model.config.add_cross_attention:
        raise UnsupportedModelError("gpt2: cross-attention (add_cross_attention=True) is not supported")
    body, spec = model.transformer, _spec(model)
    return Adapter(
        spec=spec,
        layers=tuple(_layer_ops(*each) for each in zip(body.h, spec.layers, strict=True)),
        embed=partial(_embed, body),
        rotations=(),
        final_norm=body.ln_f,
        head=model.lm_head,
    )


def _shapes(config: Any) -> dict[MapRole, MapShape]:
    d = config.n_embd
    inner = config.n_inner if config.n_inner is not None else 4 * d
    square: dict[MapRole, MapShape] = dict.fromkeys(("query", "key", "value", "output"), MapShape(d, d))
    return {**square, "up": MapShape(d, inner), "down": MapShape(inner, d)}


FAMILY = Family(
    adapt=_adapt,
    shapes=_shapes,
    body="transformer",
    layers="transformer.h",
    embedding="transformer.wte",
    maps={
        "attn.c_attn": ("query", "key", "value"),
        "attn.c_proj": ("output",),
        "mlp.c_fc": ("up",),
        "mlp.c_proj": ("down",),
    },
    inputs_first=True,
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


def _spec(model: Any) -> ModelSpec:
    config, body = model.config, model.transformer
    layer_windows(config, body.h, "none", config.n_positions)
    layers = tuple(
        layer_spec(
            block, FAMILY.maps, _shapes(config), window=None, rotary=None, scaling=_scaling(block.attn), softcap=None
        )
        for block in body.h
    )
    return model_spec(model, body.ln_f, body, layers, config.n_positions)


def _layer_ops(block: Any, spec: LayerSpec) -> LayerOps:
    attention = block.attn
    return LayerOps(
        spec=spec,
        attn_norm=block.ln_1,
        project=partial(_project, attention),
        attn_output=partial(_attn_output, attention),
        mlp_norm=block.ln_2,
        mlp=partial(_mlp, block.mlp),
        quantized=quantized_maps(block, FAMILY.maps),
        norms={"attention": block.ln_1, "mlp": block.ln_2},
        activation=block.mlp.act,
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


def _project(attention: Any, first: int, last: int, x: Tensor, apply: Apply) -> list[Tensor]:
    """Return those of queries, keys and values (0, 1 and 2) from `first` up to `last`, [N, heads, head_dim] each."""
    heads, head_dim = attention.num_heads, attention.head_dim
    parts = apply_parts(attention.c_attn, [heads * head_dim] * 3, first, last, x, apply)
    return [part.view(-1, heads, head_dim) for part in parts]
