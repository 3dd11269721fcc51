"""Declared facts of a model and the leaf operations of its layers; families fill these in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from quicksilver.cache import CacheShape, ModelIdentity
from quicksilver.core.bits import MAX_WIDTH
from quicksilver.families.modules import ModuleWatch
from quicksilver.families.rotary import Rotation
from quicksilver.ops.native import Kernels
from quicksilver.quant import NestedEmbedding, NestedLinear, NestedWeight

Map = Callable[[Tensor], Tensor]
Apply = Callable[[Any, Tensor], Tensor]
"""Applies a linear map of a layer to rows [N, in]; the runtime's, which may choose the bits to read."""


@dataclass(frozen=True)
class ModelSpec:
    """Facts of a model, enough to lay out its cache and count its work.

    Attributes:
        family: transformers' `model_type`.
        max_positions: longest context the runtime accepts.
        layer_macs: multiply-adds of one layer's weight matrices for one token.
        kv_macs: of these, the key and value projections'.
        query_macs: of these, the query and output projections'.
        mlp_macs: of these, the MLP's.
        head_macs: multiply-adds of the head for one token.
        layer_weight_bytes: bytes of one layer's weights, but for nested ones: what is read of those, a trace says.
        kv_weight_bytes: of these, the key and value projections'.
        query_weight_bytes: of these, the query and output projections'.
        mlp_weight_bytes: of these, the MLP's.
        nested_weight_bytes: bytes of one layer's nested weights, at eight bits.
        head_weight_bytes: bytes of the head and the final norm.
        head_bits: bits of one of the head's weights.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    layer_macs: int
    kv_macs: int
    query_macs: int
    mlp_macs: int
    head_macs: int
    layer_weight_bytes: int
    kv_weight_bytes: int
    query_weight_bytes: int
    mlp_weight_bytes: int
    nested_weight_bytes: int
    head_weight_bytes: int
    head_bits: int
    parameters: int
    dtype: torch.dtype
    device: torch.device

    @property
    def is_nested(self) -> bool:
        """Whether the layers' weights are nested codes."""
        return self.nested_weight_bytes > 0

    @property
    def weight_bits(self) -> int:
        """Bits of one of the layers' weights, all of them read."""
        return MAX_WIDTH if self.is_nested else 8 * self.dtype.itemsize

    @property
    def attention_macs_per_pair(self) -> int:
        """Multiply-adds of one (query, key) pair: the score and the weighted value."""
        return 2 * self.num_heads * self.head_dim

    def cache_shape(self, entry_bits: int | None = None) -> CacheShape:
        """Return what a cache for this model must know, in how many bits it keeps entries among that."""
        return CacheShape(self.num_layers, self.num_kv_heads, self.head_dim, self.dtype, self.device, entry_bits)


class QKV(NamedTuple):
    """Projections before rotation: query [N, H, D], key and value [N, Hkv, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


MapRole = Literal["query", "key", "value", "output", "gate", "up", "down"]


@dataclass(frozen=True)
class Leaves:
    """A nested layer's modules by role, for kernels that run the whole layer.

    Attributes:
        attn_norm: norm before attention.
        mlp_norm: norm before the MLP.
        query_norm: of each query head, None where there is none.
        key_norm: likewise.
        roles: of `LayerOps.nested`, in its order; a plain MLP has no gate.
        activation: of the MLP.
    """

    attn_norm: nn.Module
    mlp_norm: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    roles: tuple[MapRole, ...]
    activation: nn.Module

    @property
    def norms(self) -> dict[str, nn.Module]:
        """The norms that there are, by what they norm."""
        norms = {"attention": self.attn_norm, "mlp": self.mlp_norm, "query": self.query_norm, "key": self.key_norm}
        return {name: norm for name, norm in norms.items() if norm is not None}


@dataclass(frozen=True)
class LayerOps:
    """One pre-norm decoder layer's leaf operations over flat rows [N, d].

    Operations with weight matrices are given the function that applies them.

    Attributes:
        attn_norm: norm before attention.
        project_qkv: queries, keys and values of normed rows.
        project_kv: keys and values alone.
        project_query: queries alone.
        attn_output: output projection of attended values [N, H * D].
        mlp_norm: norm before the MLP.
        mlp: the MLP.
        scaling: factor of the attention scores.
        nested: the layer's nested maps in the order in which it applies them; none where its weights are plain.
        leaves: the layer's modules by role.
    """

    attn_norm: Map
    project_qkv: Callable[[Tensor, Apply], QKV]
    project_kv: Callable[[Tensor, Apply], tuple[Tensor, Tensor]]
    project_query: Callable[[Tensor, Apply], Tensor]
    attn_output: Callable[[Tensor, Apply], Tensor]
    mlp_norm: Map
    mlp: Callable[[Tensor, Apply], Tensor]
    scaling: float
    nested: tuple[NestedLinear, ...]
    leaves: Leaves


@dataclass(frozen=True)
class Adapter:
    """A frozen model as the runtime sees it; the tensors are the model's own, never copies.

    What it holds refers to modules openly, by `functools.partial`, so that a copy made with the model is the copy's.

    Attributes:
        spec: declared facts.
        layers: leaf operations, one set per layer.
        embed: (token ids [N], positions [N]) to hidden states [N, d].
        rotation: positions [N] to the rotation of queries and keys, or None where positions are embedded.
        final_norm: norm before the head.
        head: normed states [N, d] to logits [N, vocab].
        normed_head: states [N, d] to logits, both in one; None where they are two.
        kernels: which kernels read nested weights.
        modules: says whether the model's modules are still those that this was made of.
        identity: of the model, by which its caches know it; a copy has another.
    """

    spec: ModelSpec
    layers: tuple[LayerOps, ...]
    embed: Callable[[Tensor, Tensor], Tensor]
    rotation: Callable[[Tensor], Rotation] | None
    final_norm: nn.Module
    head: Map
    normed_head: Map | None = None
    kernels: Kernels = "torch"
    modules: ModuleWatch | None = None
    identity: ModelIdentity = field(default_factory=ModelIdentity)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [N, vocab] of states [N, d]: the final norm, then the head."""
        return self.head(self.final_norm(hidden)) if self.normed_head is None else self.normed_head(hidden)


def weight_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all plain parameters of the modules."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def num_parameters(model: nn.Module) -> int:
    """Return the parameters of a model, nested weights included."""
    return sum(p.numel() for p in model.parameters()) + num_nested(model)


def num_nested(model: nn.Module, exclude_embeddings: bool = False) -> int:
    """Return the nested weights of a model, those of its token embedding included unless it says otherwise."""
    nested = (m for m in model.modules() if isinstance(m, NestedWeight))
    counted = (m for m in nested if not (exclude_embeddings and isinstance(m, NestedEmbedding)))
    return sum(m.num_inputs * m.num_outputs for m in counted)


def nested_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all nested weights of the modules, read at eight bits."""
    return sum(
        m.num_inputs * m.channel_bytes[MAX_WIDTH]
        for module in modules
        for m in module.modules()
        if isinstance(m, NestedWeight)
    )


def nested_maps(layer: nn.Module) -> tuple[NestedLinear, ...]:
    """Return a layer's nested maps in the order in which its modules are declared."""
    return tuple(m for m in layer.modules() if isinstance(m, NestedLinear))


def head_bits(head: nn.Module, dtype: torch.dtype) -> int:
    """Return the bits of one of the head's weights."""
    return MAX_WIDTH if isinstance(head, NestedWeight) else 8 * dtype.itemsize
