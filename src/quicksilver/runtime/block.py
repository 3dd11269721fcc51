"""One decoder layer over a ragged batch: the tokens that run it, and what is written for those that do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quicksilver.cache import RaggedKVCache
from quicksilver.core.decisions import Fill
from quicksilver.core.ragged import RaggedLayout, TokenState
from quicksilver.core.trace import Trace
from quicksilver.models.rotary import Rotation
from quicksilver.models.spec import LayerOps
from quicksilver.ops import AttentionBackend, ragged_attention
from quicksilver.runtime.halting import HaltedTokens


@dataclass(frozen=True)
class PassContext:
    """What stays the same through one pass.

    Attributes:
        chunk: layout of all tokens of the pass.
        rotation: of all tokens of the pass, None where positions are embedded.
        cache: extended by every layer.
        trace: counts what runs.
        backend: attention implementation.
    """

    chunk: RaggedLayout
    rotation: Rotation | None
    cache: RaggedKVCache
    trace: Trace
    backend: AttentionBackend


@dataclass(frozen=True)
class Skipped:
    """The tokens that a layer does not run, and how their entries in it come about."""

    tokens: HaltedTokens
    fill: Fill


def run_layer(
    layer: LayerOps,
    layer_idx: int,
    state: TokenState,
    rotation: Rotation | None,
    skipped: Skipped,
    context: PassContext,
) -> TokenState:
    """Run a layer for the tokens of `state`; write its entries; return the new state."""
    query, key, value = layer.project_qkv(layer.attn_norm(state.hidden))
    if rotation is not None:
        query, key = rotation.apply(query), rotation.apply(key)
    _write(layer, layer_idx, state.layout, (key, value), skipped, context)
    attended = _attend(query, state.layout, layer_idx, layer.scaling, skipped.fill, context)
    hidden = state.hidden + layer.attn_output(attended)
    hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
    context.trace.layers[layer_idx].query_rows += hidden.shape[0]
    return TokenState(hidden, state.layout)


def fill_layer(layer: LayerOps, layer_idx: int, skipped: Skipped, context: PassContext) -> None:
    """Write the entries of a layer that no token runs."""
    if skipped.fill is Fill.NONE:
        return
    shape = context.cache.shape
    none = torch.empty((0, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype, device=shape.device)
    nobody = context.chunk.select(context.chunk.origin[:0])
    _write(layer, layer_idx, nobody, (none, none), skipped, context)


def _write(
    layer: LayerOps,
    layer_idx: int,
    layout: RaggedLayout,
    running: tuple[Tensor, Tensor],
    skipped: Skipped,
    context: PassContext,
) -> None:
    """Write running tokens' keys and values and, as the fill says, halted tokens', in order of position."""
    cache, chunk, halted = context.cache, context.chunk, skipped.tokens
    key, value = running
    if halted.rows is None or halted.grid is None or skipped.fill is Fill.NONE:
        cache.append(layer_idx, layout, key, value)
    elif skipped.fill is Fill.REFER:
        cache.append(layer_idx, layout, key, value, refer=chunk)
    else:
        shape = (chunk.num_tokens, *key.shape[1:])
        keys, values = key.new_zeros(shape), value.new_zeros(shape)
        keys.index_copy_(0, layout.origin, key)
        values.index_copy_(0, layout.origin, value)
        if skipped.fill is Fill.PROJECT:
            frozen = layer.attn_norm(halted.grid.index_select(0, halted.rows))
            frozen_key, frozen_value = layer.project_kv(frozen)
            if context.rotation is not None:
                frozen_key = context.rotation.select(halted.rows).apply(frozen_key)
            keys.index_copy_(0, halted.rows, frozen_key)
            values.index_copy_(0, halted.rows, frozen_value)
            context.trace.layers[layer_idx].fill_rows += frozen.shape[0]
        cache.append(layer_idx, chunk, keys, values)


def _attend(
    query: Tensor, layout: RaggedLayout, layer_idx: int, scaling: float, fill: Fill, context: PassContext
) -> Tensor:
    """Attend within each sequence; return [N, num_heads * head_dim]."""
    outputs, bounds = [], layout.bounds
    for seq, length in enumerate(layout.lengths):
        if length == 0:
            continue
        rows = slice(bounds[seq], bounds[seq + 1])
        entries = context.cache.entries(layer_idx, seq)
        output, pairs = ragged_attention(
            query[rows],
            entries.keys,
            entries.values,
            layout.positions[rows],
            entries.positions,
            scaling,
            newest=fill is Fill.NONE or length == context.chunk.lengths[seq],
            backend=context.backend,
        )
        context.trace.layers[layer_idx].attended.add(pairs)
        outputs.append(output)
    attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return attended.flatten(1)
