"""Declared facts of a model and the leaf operations of its layers; families fill these in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.cache import CacheShape, ModelIdentity
from quicksilver.core.bits import MAX_BITS
from quicksilver.core.signals import softmax_entropy
from quicksilver.families.centres import key_centres
from quicksilver.families.family import MapRole, MapShape
from quicksilver.families.modules import ModuleWatch, float_weight
from quicksilver.families.rotary import Rotation
from quicksilver.ops.native import Kernels
from quicksilver.weights import AnyPrecisionEmbedding, AnyPrecisionLinear, AnyPrecisionSplit, AnyPrecisionWeight

Map = Callable[[Tensor], Tensor]
Apply = Callable[[Any, Tensor], Tensor]
"""Applies a linear map of a layer to rows [N, in]; the runtime's, which may choose the bits to read."""

ENTRY: tuple[MapRole, ...] = ("key", "value")
QUERY: tuple[MapRole, ...] = ("query", "output")
MLP: tuple[MapRole, ...] = ("gate", "up", "down")
"""What a layer does for a cache entry, for a query, and in its MLP."""

_ENTROPY_ROWS = 256  # rows of logits held at a time


@dataclass(frozen=True)
class LayerSpec:
    """Facts of one layer."""

    # keys that a query may see, itself included, by their positions; None where it sees all before it
    window: int | None
    rotary: int | None  # which of `Adapter.rotations` turns its queries and keys, None where none does
    scaling: float  # factor of the attention scores
    softcap: float | None  # scores `s` are `softcap * tanh(s / softcap)`; None where they are taken as they are
    maps: Mapping[MapRole, MapShape]  # sizes of its linear maps by role, in the order in which it applies them
    # bytes of each map's weights, but for quantized ones: what is read of those, a trace says
    map_bytes: Mapping[MapRole, int]
    weight_bytes: int  # of all of its weights, likewise
    quantized_weight_bytes: int  # bytes of its any-precision weights, at eight bits

    def macs_of(self, *roles: MapRole) -> int:
        """Return the multiply-adds of some of its weight matrices, of all where none is named, for one token."""
        shapes = (self.maps[role] for role in roles or self.maps if role in self.maps)
        return sum(shape.num_inputs * shape.num_outputs for shape in shapes)

    def bytes_of(self, *roles: MapRole) -> int:
        """Return how many of `weight_bytes` are those of some maps."""
        return sum(self.map_bytes.get(role, 0) for role in roles)


@dataclass(frozen=True)
class ModelSpec:
    """Facts of a model, enough to lay out its cache and count its work."""

    family: str  # transformers' `model_type`
    layers: tuple[LayerSpec, ...]  # facts of each layer
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int  # longest context the runtime accepts
    head_macs: int  # multiply-adds of the head for one token
    head_weight_bytes: int  # bytes of the head and the final norm
    head_bits: int  # bits of one of the head's weights
    parameters: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds of all layers' weight matrices for one token."""
        return sum(layer.macs_of() for layer in self.layers)

    @property
    def is_quantized(self) -> bool:
        """Whether the layers' weights are any-precision codes."""
        return self.layers[0].quantized_weight_bytes > 0

    @property
    def weight_bits(self) -> int:
        """Bits of one of the layers' weights, all of them read."""
        return MAX_BITS if self.is_quantized else 8 * self.dtype.itemsize

    @property
    def attention_macs_per_pair(self) -> int:
        """Multiply-adds of one (query, key) pair: the score and the weighted value."""
        return 2 * self.num_heads * self.head_dim

    def cache_shape(self, entry_bits: int | None = None) -> CacheShape:
        """Return what a cache for this model must know, in how many bits it keeps entries among that."""
        return CacheShape(self.num_layers, self.num_kv_heads, self.head_dim, self.dtype, self.device, entry_bits)


@dataclass(frozen=True)
class LayerOps:
    """One decoder layer's leaf operations over flat rows [N, d].

    Operations with weight matrices are given the function that applies them. What a sublayer adds to the states is one
    operation: norms behind it and factors belong to it.
    """

    spec: LayerSpec  # declared facts
    attn_norm: Map  # norm before attention, the identity where there is none
    # queries [N, H, D], keys and values [N, Hkv, D] before rotation (0, 1 and 2), of normed rows: from the first number
    # up to the second
    project: Callable[[int, int, Tensor, Apply], list[Tensor]]
    attn_output: Callable[[Tensor, Apply], Tensor]  # what attention adds to the states, from attended values [N, H * D]
    mlp_norm: Map  # norm before the MLP, likewise
    mlp: Callable[[Tensor, Apply], Tensor]  # what the MLP adds to the states, from normed ones
    # the layer's quantized maps in the order in which it applies them; none where its weights are plain
    quantized: tuple[AnyPrecisionLinear, ...]
    # what kernels that run the whole layer read besides: its norms by what they norm, of "attention", "mlp", "query",
    # "key", "attention_post" and "mlp_post" those that there are, and the activation of its MLP
    norms: Mapping[str, nn.Module]
    activation: nn.Module
    norms_projections: bool = False  # norms of queries and keys are of the whole projection, not of each head
    residual_scale: float | None = None  # factor of what a sublayer adds, None for 1


@dataclass(frozen=True)
class Adapter:
    """A frozen model as the runtime sees it; the tensors are the model's own, never copies.

    What it holds refers to modules openly, by `functools.partial`, so that a copy made with the model is the copy's.
    """

    spec: ModelSpec  # declared facts
    layers: tuple[LayerOps, ...]  # leaf operations, one set per layer
    embed: Callable[[Tensor, Tensor], Tensor]  # (token ids [N], positions [N]) to hidden states [N, d]
    # positions [N] to rotations of queries and keys, those that there are; each layer names its own
    rotations: tuple[Callable[[Tensor], Rotation], ...]
    final_norm: nn.Module  # norm before the head
    head: Map  # normed states [N, d] to scores of tokens [N, vocab]
    normed_head: Map | None = None  # states [N, d] to scores, both in one; None where they are two
    finish: Map | None = None  # scores to logits, None where they are the same
    kernels: Kernels = "torch"  # which kernels read any-precision weights
    modules: ModuleWatch | None = None  # says whether the model's modules are still those that this was made of
    # of the model, by which its caches know it; a copy has another
    identity: ModelIdentity = field(default_factory=ModelIdentity)

    @cached_property
    def key_centres(self) -> tuple[Tensor | None, ...]:
        """What keys of each layer are kept less of in few bits; always the same, as caches outlive plans."""
        return key_centres(self)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [N, vocab] of states [N, d]: the final norm, then the head."""
        scores = self.head(self.final_norm(hidden)) if self.normed_head is None else self.normed_head(hidden)
        return scores if self.finish is None else self.finish(scores)

    def head_entropy(self, hidden: Tensor) -> Tensor:
        """Return the entropy in bits of what the head predicts from states [M, d], [M]."""
        return torch.cat([softmax_entropy(self.logits(rows)) for rows in hidden.split(_ENTROPY_ROWS)])

    def cut_behind(self, layer_idx: int) -> Adapter:
        """Return the model's layers up to and with one, as a model."""
        upto = slice(layer_idx + 1)
        return replace(self, spec=replace(self.spec, layers=self.spec.layers[upto]), layers=self.layers[upto])


def weight_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all plain parameters of the modules."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def num_quantized(model: nn.Module, exclude_embeddings: bool = False) -> int:
    """Return the any-precision weights of a model, those of its token embedding included unless it says otherwise."""
    quantized = (m for m in model.modules() if isinstance(m, AnyPrecisionWeight))
    counted = (m for m in quantized if not (exclude_embeddings and isinstance(m, AnyPrecisionEmbedding)))
    return sum(m.num_inputs * m.num_outputs for m in counted)


def quantized_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all any-precision weights of the modules, read at eight bits."""
    return sum(
        m.num_inputs * m.channel_bytes[MAX_BITS]
        for module in modules
        for m in module.modules()
        if isinstance(m, AnyPrecisionWeight)
    )


def quantized_maps(layer: nn.Module, maps: Iterable[str]) -> tuple[AnyPrecisionLinear, ...]:
    """Return a layer's quantized maps by their paths, in that order; a map that is several as those."""
    found = (layer.get_submodule(path) for path in maps)
    parts = chain.from_iterable(map_.parts if isinstance(map_, AnyPrecisionSplit) else [map_] for map_ in found)
    return tuple(part for part in parts if isinstance(part, AnyPrecisionLinear))


def layer_spec(
    layer: nn.Module, maps: Mapping[str, tuple[MapRole, ...]], shapes: Mapping[MapRole, MapShape], **attention: Any
) -> LayerSpec:
    """Return the facts of a layer, its linear maps given as roles by path and sizes by role."""
    map_bytes: dict[MapRole, int] = {}
    for path, roles in maps.items():
        total = sum(shapes[role].num_outputs for role in roles)
        of_all = weight_bytes(layer.get_submodule(path))
        map_bytes |= {role: of_all * shapes[role].num_outputs // total for role in roles}
    return LayerSpec(
        **attention,
        maps=shapes,
        map_bytes=map_bytes,
        weight_bytes=weight_bytes(layer),
        quantized_weight_bytes=quantized_bytes(layer),
    )


def model_spec(model: Any, norm: nn.Module, body: nn.Module, layers: tuple[LayerSpec, ...], limit: int) -> ModelSpec:
    """Return the facts of a model of such layers, a final norm and the head `lm_head`, its context at most `limit`."""
    config, head, weight = model.config, model.lm_head, float_weight(norm, body)
    head_dim = layers[0].maps["query"].num_outputs // config.num_attention_heads
    return ModelSpec(
        family=config.model_type,
        layers=layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=layers[0].maps["key"].num_outputs // head_dim,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_positions=limit,
        head_macs=config.hidden_size * config.vocab_size,
        head_weight_bytes=weight_bytes(head, norm) + quantized_bytes(head),
        head_bits=MAX_BITS if isinstance(head, AnyPrecisionWeight) else 8 * weight.dtype.itemsize,
        parameters=sum(p.numel() for p in model.parameters()) + num_quantized(model),
        dtype=weight.dtype,
        device=weight.device,
    )
