"""Layers like Llama's, and what of them differs by family: each is a `LlamaLike`, declared in a file of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.errors import UnsupportedModelError
from quicksilver.families.family import Family, MapRole, MapShape
from quicksilver.families.fused import apply_parts
from quicksilver.families.modules import float_weight
from quicksilver.families.rotary import Rotation, RotationTable
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
from quicksilver.families.windows import Windows, kinds_of, layer_windows

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_NORMS = ("attention", "mlp", "attention_post", "mlp_post", "query", "key")
_MAPS: dict[str, tuple[MapRole, ...]] = {
    "self_attn.q_proj": ("query",),
    "self_attn.k_proj": ("key",),
    "self_attn.v_proj": ("value",),
    "self_attn.o_proj": ("output",),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
}
_FUSED_MAPS: dict[str, tuple[MapRole, ...]] = {
    "self_attn.qkv_proj": ("query", "key", "value"),
    "self_attn.o_proj": ("output",),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": ("down",),
}


@dataclass(frozen=True)
class LlamaLike:
    """What a family has that Llama has not, or has otherwise. What is a function reads it from the configuration."""

    prefix: str  # with which its classes' names begin
    body: str = ""  # name of the class of its body, `{prefix}Model` unless given
    # names of a layer's norms before attention and before the MLP, None where there is none
    norms: tuple[str | None, str | None] = ("input_layernorm", "post_attention_layernorm")
    post_norms: tuple[str | None, str | None] = (None, None)  # behind them, before what a sublayer made is added
    norm_offset: float = 0.0  # what its norms add to their weights
    norms_projections: bool = False  # norms of queries and keys, if any, are over all heads, not over each
    fused: bool = False  # queries, keys and values are one map, `qkv_proj`, and so are gate and up, `gate_up_proj`
    activation: str = "act_fn"  # name of the MLP's activation
    idle: tuple[str, ...] = ()  # names of a layer's modules that do nothing when a frozen model runs
    windows: Windows = "none"  # which layers `sliding_window` is for
    rotates: Callable[[Any], Sequence[Any]] | None = None  # for each layer, whether it rotates queries and keys
    softcap: Callable[[Any], float | None] | None = None  # bound of attention scores
    residual_scale: Callable[[Any], float] | None = None  # factor of what a sublayer adds to the states
    # factor of embeddings, in a dtype; None where their module multiplies by it
    embedding_scale: Callable[[Any, torch.dtype], float | None] | None = None
    logits_divisor: Callable[[Any], float] | None = None  # what the head's products are divided by
    logits_softcap: Callable[[Any], float | None] | None = None  # bound of logits
    refused: tuple[str, ...] = ()  # options that must not be set

    @property
    def maps(self) -> dict[str, tuple[MapRole, ...]]:
        """Linear maps of a layer, as in `Family`."""
        return _FUSED_MAPS if self.fused else _MAPS


def declare(like: LlamaLike) -> Family:
    """Return the declaration of a family of this kind."""
    norms = [f"model.layers.*.{name}" for name in (*like.norms, *like.post_norms) if name is not None]
    return Family(
        adapt=partial(_adapt, like),
        shapes=_shapes,
        body="model",
        layers="model.layers",
        embedding="model.embed_tokens",
        maps=like.maps,
        run={
            "": f"{like.prefix}ForCausalLM",
            "model": like.body or f"{like.prefix}Model",
            "model.rotary_emb": f"{like.prefix}RotaryEmbedding",
            "model.layers": "",
            "model.layers.*": f"{like.prefix}DecoderLayer",
            "model.layers.*.self_attn": f"{like.prefix}Attention",
            "model.layers.*.mlp": f"{like.prefix}MLP",
            **{f"model.layers.*.{name}": "" for name in like.idle},
        },
        called=(
            "model.embed_tokens",
            *norms,
            "model.layers.*.self_attn.q_norm",
            "model.layers.*.self_attn.k_norm",
            f"model.layers.*.mlp.{like.activation}",
            "model.norm",
            "lm_head",
        ),
        norm_offset=like.norm_offset,
    )


def _shapes(config: Any) -> dict[MapRole, MapShape]:
    d, inner, head_dim = config.hidden_size, config.intermediate_size, _head_dim(config)
    queries, entries = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        "query": MapShape(d, queries),
        "key": MapShape(d, entries),
        "value": MapShape(d, entries),
        "output": MapShape(queries, d),
        "gate": MapShape(d, inner),
        "up": MapShape(d, inner),
        "down": MapShape(inner, d),
    }


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _adapt(like: LlamaLike, model: Any) -> Adapter:
    """Read a model of transformers; UnsupportedModelError where its configuration asks for more than is known here."""
    config, body = model.config, model.model
    _check(like, config)
    kinds = _rotary_kinds(config, body.layers)
    for kind in kinds:
        _check_rotary(config, kind)
    like_weight = float_weight(body.norm, body)
    spec = _spec(like, model, kinds)
    scale = _given(like.embedding_scale, config, spec.dtype)
    rotary = _rotary_module(model, kinds)
    compute = [partial(_rotation, rotary, like_weight, kind) for kind in kinds]
    return Adapter(
        spec=spec,
        layers=tuple(_layer_ops(like, config, *each) for each in zip(body.layers, spec.layers, strict=True)),
        embed=partial(_embed, body, scale),
        rotations=tuple(RotationTable(each, spec.max_positions) for each in compute),
        final_norm=body.norm,
        head=model.lm_head,
        finish=_finish(like, config),
    )


def _check(like: LlamaLike, config: Any) -> None:
    for option in like.refused:
        if value := getattr(config, option, None):
            raise UnsupportedModelError(f"{config.model_type}: {option}={value} is not supported")


def _rotary_kinds(config: Any, layers: Sequence[Any]) -> list[str | None]:
    """Return the kinds of layers that have rotary frequencies of their own, [None] where all layers have the same."""
    kinds = sorted(set(kinds_of(config, layers)))
    return [*kinds] if any(kind in config.rope_parameters for kind in kinds) else [None]


def _check_rotary(config: Any, kind: str | None) -> None:
    rope, family = _rope(config, kind), config.model_type
    if not isinstance(rope, Mapping) or "rope_type" not in rope:
        raise UnsupportedModelError(
            f"{family}: rope_parameters with the keys {', '.join(map(repr, config.rope_parameters))} are not supported:"
            f" 'rope_type' is missing{'' if kind is None else f' for layers of kind {kind!r}'}"
        )
    if rope["rope_type"] not in _ROPE_TYPES:
        raise UnsupportedModelError(f"{family}: rotary scaling of type {rope['rope_type']!r} is not supported")
    factor = rope.get("partial_rotary_factor")
    if factor is not None and factor != 1:
        raise UnsupportedModelError(
            f"{family}: heads rotated in part (partial_rotary_factor={factor}) are not supported"
        )


def _rope(config: Any, kind: str | None) -> dict[str, Any]:
    """Return the rotary parameters of all layers, or of those of a kind."""
    return config.rope_parameters if kind is None else config.rope_parameters.get(kind)


def _max_positions(config: Any, kind: str | None) -> int:
    """Return the longest context in which a token's rotation does not depend on later tokens.

    Beyond it frequencies switch for the whole sequence: with `longrope` once it outgrows the original length.
    """
    rope, limit = _rope(config, kind), config.max_position_embeddings
    return int((rope.get("original_max_position_embeddings") if rope["rope_type"] == "longrope" else None) or limit)


def _spec(like: LlamaLike, model: Any, kinds: Sequence[str | None]) -> ModelSpec:
    config, body = model.config, model.model
    limit = min(_max_positions(config, kind) for kind in kinds)
    windows = layer_windows(config, body.layers, like.windows, limit)
    rotates = [True] * len(body.layers) if like.rotates is None else like.rotates(config)
    rotary = [0 if kinds == [None] else kinds.index(kind) for kind in kinds_of(config, body.layers)]
    layers = tuple(
        layer_spec(
            layer,
            like.maps,
            _shapes(config),
            window=windows[i],
            rotary=rotary[i] if rotates[i] else None,
            scaling=layer.self_attn.scaling,
            softcap=_given(like.softcap, config),
        )
        for i, layer in enumerate(body.layers)
    )
    return model_spec(model, body.norm, body, layers, limit)


def _layer_ops(like: LlamaLike, config: Any, layer: Any, spec: LayerSpec) -> LayerOps:
    attention, mlp = layer.self_attn, layer.mlp
    fused = [shape.num_outputs for shape in spec.maps.values()] if like.fused else []
    norms = [None if name is None else getattr(layer, name) for name in (*like.norms, *like.post_norms)]
    residual_scale = _given(like.residual_scale, config)
    activation = getattr(mlp, like.activation)
    qkv_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    by_name = dict(zip(_NORMS, (*norms, *qkv_norms), strict=True))
    heads = _Heads(attention, fused[:3], (*qkv_norms, None), attention.head_dim, like.norms_projections)
    return LayerOps(
        spec=spec,
        attn_norm=norms[0] or _identity,
        project=partial(_project, heads),
        attn_output=_added(partial(_attn_output, attention), norms[2], residual_scale),
        mlp_norm=norms[1] or _identity,
        mlp=_added(partial(_mlp, mlp, activation, fused[4:6]), norms[3], residual_scale),
        quantized=quantized_maps(layer, like.maps),
        norms={name: norm for name, norm in by_name.items() if norm is not None},
        activation=activation,
        norms_projections=like.norms_projections,
        residual_scale=residual_scale,
    )


def _given(read: Callable[..., Any] | None, *arguments: Any) -> Any:
    """Return what a family reads from the configuration, None where it reads nothing."""
    return None if read is None else read(*arguments)


def _identity(x: Tensor) -> Tensor:
    return x


def _embed(body: Any, scale: float | None, ids: Tensor, positions: Tensor) -> Tensor:
    embedded = body.embed_tokens(ids)
    return embedded if scale is None else embedded * scale


@dataclass(frozen=True)
class _Heads:
    """How queries, keys and values come about."""

    attention: Any  # holds their maps
    fused: Sequence[int]  # outputs of each where they are one map, else empty
    norms: Sequence[nn.Module | None]  # of queries, keys and values, None where there is none
    head_dim: int
    norms_projections: bool  # norms are over all heads


def _project(heads: _Heads, first: int, last: int, x: Tensor, apply: Apply) -> list[Tensor]:
    """Return those of queries, keys and values (0, 1 and 2) from `first` up to `last`, [N, heads, head_dim]."""
    attention, projected = heads.attention, []
    parts = apply_parts(attention.qkv_proj, heads.fused, first, last, x, apply) if heads.fused else None
    for i in range(first, last):
        y = apply(getattr(attention, _PROJECTIONS[i]), x) if parts is None else parts[i - first]
        norm = heads.norms[i]
        if norm is not None and heads.norms_projections:
            y, norm = norm(y), None
        y = y.view(y.shape[0], -1, heads.head_dim)
        projected.append(y if norm is None else norm(y))
    return projected


def _attn_output(attention: Any, x: Tensor, apply: Apply) -> Tensor:
    return apply(attention.o_proj, x)


def _mlp(mlp: Any, activation: Any, fused: Sequence[int], x: Tensor, apply: Apply) -> Tensor:
    if fused:
        gate, up = apply_parts(mlp.gate_up_proj, fused, 0, 2, x, apply)
    else:
        gate, up = apply(mlp.gate_proj, x), apply(mlp.up_proj, x)
    return apply(mlp.down_proj, activation(gate) * up)


def _added(
    sublayer: Callable[[Tensor, Apply], Tensor], post_norm: Any, scale: float | None
) -> Callable[[Tensor, Apply], Tensor]:
    """Return what a sublayer adds to the states, from what it makes."""
    return sublayer if post_norm is None and scale is None else partial(_norm_and_scale, sublayer, post_norm, scale)


def _norm_and_scale(sublayer: Any, post_norm: Any, scale: float | None, x: Tensor, apply: Apply) -> Tensor:
    y = sublayer(x, apply)
    y = y if post_norm is None else post_norm(y)
    return y if scale is None else y * scale


def _finish(like: LlamaLike, config: Any) -> Callable[[Tensor], Tensor] | None:
    divisor, softcap = _given(like.logits_divisor, config), _given(like.logits_softcap, config)
    return None if divisor is None and softcap is None else partial(_to_logits, divisor, softcap)


def _to_logits(divisor: float | None, softcap: float | None, scores: Tensor) -> Tensor:
    scores = scores if divisor is None else scores / divisor
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _rotary_module(model: Any, kinds: Sequence[str | None]) -> Any:
    """Return the model's rotary module; one of our own where it remembers the longest sequence it has seen."""
    shared = model.model.rotary_emb
    if any(_rope(model.config, kind)["rope_type"] in ("dynamic", "longrope") for kind in kinds):
        return type(shared)(model.config).to(float_weight(model.model.norm, model.model).device)
    return shared


def _rotation(rotary_emb: Any, like: Tensor, kind: str | None, positions: Tensor) -> Rotation:
    of_kind = () if kind is None else (kind,)
    cos, sin = rotary_emb(like, positions[None], *of_kind)  # [1, N, head_dim] each, in the dtype of `like`
    return Rotation(cos[0, :, None], sin[0, :, None])
