"""The Llama family: Llama itself, Mistral, Qwen2 and Qwen3. They differ in biases and query/key norms only."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from quicksilver.errors import UnsupportedModelError
from quicksilver.families.modules import ModuleLayout, float_weight
from quicksilver.families.rotary import Rotation, RotationTable
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

_ROLES: tuple[MapRole, ...] = ("query", "key", "value", "output", "gate", "up", "down")
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def module_layout(prefix: str) -> ModuleLayout:
    """Return where a family of this kind, whose classes' names begin with `prefix`, keeps its modules."""
    attention = [f"model.layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    mlp = [f"model.layers.*.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    return ModuleLayout(
        run={
            "": f"{prefix}ForCausalLM",
            "model": f"{prefix}Model",
            "model.rotary_emb": f"{prefix}RotaryEmbedding",
            "model.layers": "",
            "model.layers.*": f"{prefix}DecoderLayer",
            "model.layers.*.self_attn": f"{prefix}Attention",
            "model.layers.*.mlp": f"{prefix}MLP",
        },
        maps=(*attention, *mlp),
        called=(
            "model.embed_tokens",
            "model.layers.*.input_layernorm",
            "model.layers.*.self_attn.q_norm",
            "model.layers.*.self_attn.k_norm",
            "model.layers.*.post_attention_layernorm",
            "model.layers.*.mlp.act_fn",
            "model.norm",
            "lm_head",
        ),
    )


def adapt(model: Any) -> Adapter:
    """Read a Llama, Mistral, Qwen2 or Qwen3 model of transformers.

    Raises:
        UnsupportedModelError: the configuration asks for something not implemented here.
    """
    _check(model.config)
    body, spec = model.model, _spec(model)
    like = float_weight(body.norm, body)
    return Adapter(
        spec=spec,
        layers=tuple(map(_layer_ops, body.layers)),
        embed=partial(_embed, body),
        rotation=RotationTable(partial(_rotation, _rotary_module(model), like), spec.max_positions),
        final_norm=body.norm,
        head=model.lm_head,
    )


def _check(config: Any) -> None:
    family = config.model_type
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModelError(f"{family}: rotary scaling of type {rope_type!r} is not supported")
    factor = config.rope_parameters.get("partial_rotary_factor")
    if factor is not None and factor != 1:
        raise UnsupportedModelError(
            f"{family}: heads rotated in part (partial_rotary_factor={factor}) are not supported"
        )


def _max_positions(config: Any) -> int:
    """Return the longest context in which a token's rotation does not depend on later tokens.

    `longrope` switches its frequencies for the whole sequence once it outgrows the original length, so the
    original length is the limit; `dynamic` does so beyond `max_position_embeddings`.
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "longrope":
        return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return int(config.max_position_embeddings)


def _spec(model: Any) -> ModelSpec:
    config, body = model.config, model.model
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    d, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    query_macs, kv_macs = 2 * d * heads * head_dim, 2 * d * kv_heads * head_dim
    mlp_macs = 3 * d * config.intermediate_size
    attention, like = body.layers[0].self_attn, float_weight(body.norm, body)
    return ModelSpec(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=d,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_positions=_max_positions(config),
        layer_macs=query_macs + kv_macs + mlp_macs,
        kv_macs=kv_macs,
        query_macs=query_macs,
        mlp_macs=mlp_macs,
        head_macs=d * config.vocab_size,
        layer_weight_bytes=weight_bytes(body.layers[0]),
        kv_weight_bytes=weight_bytes(attention.k_proj, attention.v_proj),
        query_weight_bytes=weight_bytes(attention.q_proj, attention.o_proj),
        mlp_weight_bytes=weight_bytes(body.layers[0].mlp),
        nested_weight_bytes=nested_bytes(body.layers[0]),
        head_weight_bytes=weight_bytes(model.lm_head, body.norm) + nested_bytes(model.lm_head),
        head_bits=head_bits(model.lm_head, like.dtype),
        parameters=num_parameters(model),
        dtype=like.dtype,
        device=like.device,
    )


def _layer_ops(layer: Any) -> LayerOps:
    attention = layer.self_attn
    return LayerOps(
        attn_norm=layer.input_layernorm,
        project_qkv=partial(_project_qkv, attention),
        project_kv=partial(_project_kv, attention),
        project_query=partial(_project_query, attention),
        attn_output=partial(_attn_output, attention),
        mlp_norm=layer.post_attention_layernorm,
        mlp=partial(_mlp, layer.mlp),
        scaling=attention.scaling,
        nested=nested_maps(layer),
        leaves=Leaves(
            attn_norm=layer.input_layernorm,
            mlp_norm=layer.post_attention_layernorm,
            query_norm=getattr(attention, "q_norm", None),
            key_norm=getattr(attention, "k_norm", None),
            roles=_ROLES,
            activation=layer.mlp.act_fn,
        ),
    )


def _embed(body: Any, ids: Tensor, positions: Tensor) -> Tensor:
    return body.embed_tokens(ids)


def _attn_output(attention: Any, x: Tensor, apply: Apply) -> Tensor:
    return apply(attention.o_proj, x)


def _heads(x: Tensor, head_dim: int, norm: nn.Module | None = None) -> Tensor:
    """Split [N, heads * head_dim] into heads, normed per head where the family does so (Qwen3)."""
    x = x.view(x.shape[0], -1, head_dim)
    return x if norm is None else norm(x)


def _project_kv(attention: Any, x: Tensor, apply: Apply) -> tuple[Tensor, Tensor]:
    key = _heads(apply(attention.k_proj, x), attention.head_dim, getattr(attention, "k_norm", None))
    return key, _heads(apply(attention.v_proj, x), attention.head_dim)


def _project_query(attention: Any, x: Tensor, apply: Apply) -> Tensor:
    return _heads(apply(attention.q_proj, x), attention.head_dim, getattr(attention, "q_norm", None))


def _project_qkv(attention: Any, x: Tensor, apply: Apply) -> QKV:
    return QKV(_project_query(attention, x, apply), *_project_kv(attention, x, apply))


def _mlp(mlp: Any, x: Tensor, apply: Apply) -> Tensor:
    return apply(mlp.down_proj, mlp.act_fn(apply(mlp.gate_proj, x)) * apply(mlp.up_proj, x))


def _rotary_module(model: Any) -> Any:
    """Return the model's rotary module; one of our own where it remembers the longest sequence it has seen."""
    shared = model.model.rotary_emb
    if model.config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        return type(shared)(model.config).to(float_weight(model.model.norm, model.model).device)
    return shared


def _rotation(rotary_emb: Any, like: Tensor, positions: Tensor) -> Rotation:
    cos, sin = rotary_emb(like, positions[None])  # [1, N, head_dim] each, in the dtype of `like`
    return Rotation(cos[0, :, None], sin[0, :, None])
