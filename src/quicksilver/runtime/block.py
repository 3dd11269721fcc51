"""One decoder layer over a ragged batch: the tokens that run it, and what is written for those that do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quicksilver.core.decisions import Fill
from quicksilver.core.ragged import RaggedLayout, TokenState
from quicksilver.models.spec import Apply, LayerOps
from quicksilver.ops import ragged_attention
from quicksilver.runtime.context import PassContext
from quicksilver.runtime.status import Running, TokenStatus


@dataclass(frozen=True)
class Skipped:
    """How the tokens that a layer does not run stand, and how their entries in it come about."""

    status: TokenStatus
    fill: Fill


def run_layer(
    layer: LayerOps, layer_idx: int, running: Running, skipped: Skipped, context: PassContext, keeps_keys: bool = False
) -> Running:
    """Run a layer for the running tokens; write its entries; return the tokens as they leave it.

    Args:
        layer: its leaf operations.
        layer_idx: its index.
        running: the tokens that run it.
        skipped: the others.
        context: of the pass.
        keeps_keys: return the keys, before rotation, too.
    """
    state = running.state
    apply = _linear(layer_idx, state.layout.origin, skipped.status, context)
    query, key, value = layer.project_qkv(layer.attn_norm(state.hidden), apply)
    key, value = _project_shifted(layer, layer_idx, state, (key, value), skipped.status, context)
    keys = key if keeps_keys else None
    if running.rotation is not None:
        query, key = running.rotation.apply(query), running.rotation.apply(key)
    _write(layer, layer_idx, state, (key, value), skipped, context)
    attended = _attend(query, state.layout, layer_idx, layer.scaling, skipped, context)
    hidden = state.hidden + layer.attn_output(attended, apply)
    hidden = hidden + layer.mlp(layer.mlp_norm(hidden), apply)
    context.trace.layers[layer_idx].query_rows += hidden.shape[0]
    state = TokenState(hidden, state.layout, state.mass, state.shift)
    return Running(state, running.rotation, running.update, keys)


def fill_layer(layer: LayerOps, layer_idx: int, skipped: Skipped, context: PassContext) -> None:
    """Write the entries of a layer that no token runs."""
    if skipped.fill is Fill.NONE:
        return
    shape = context.cache.shape
    none = torch.empty((0, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype, device=shape.device)
    nobody = TokenState(none, context.chunk.select(context.chunk.origin[:0]))
    _write(layer, layer_idx, nobody, (none, none), skipped, context)


def _linear(layer_idx: int, origins: Tensor, status: TokenStatus, context: PassContext) -> Apply:
    """Return the function that applies a layer's maps to rows of the tokens `origins` ([M])."""
    return context.precision.linear(layer_idx, origins, status.caps, context.exempt, context.trace.layers[layer_idx])


def _project_shifted(
    layer: LayerOps,
    layer_idx: int,
    state: TokenState,
    projected: tuple[Tensor, Tensor],
    status: TokenStatus,
    context: PassContext,
) -> tuple[Tensor, Tensor]:
    """Return keys and values, those of super-tokens projected from their shifted states where they are shifted."""
    if state.mass is None or state.shift is None:
        return projected
    rows = (state.mass > 1).nonzero().squeeze(-1)
    if rows.shape[0] == 0:
        return projected
    means = state.hidden.index_select(0, rows) + state.shift.index_select(0, rows)
    apply = _linear(layer_idx, state.layout.origin.index_select(0, rows), status, context)
    key, value = (
        own.index_copy(0, rows, merged)
        for own, merged in zip(projected, layer.project_kv(layer.attn_norm(means), apply), strict=True)
    )
    context.trace.layers[layer_idx].fill_rows += rows.shape[0]
    return key, value


def _write(
    layer: LayerOps,
    layer_idx: int,
    state: TokenState,
    running: tuple[Tensor, Tensor],
    skipped: Skipped,
    context: PassContext,
) -> None:
    """Write running tokens' keys and values and, as the fill says, halted tokens', in order of position."""
    cache, chunk, status, layout = context.cache, context.chunk, skipped.status, state.layout
    key, value = running
    if status.halted is None or status.frozen is None or skipped.fill is Fill.NONE:
        cache.append(layer_idx, layout, key, value, masses=state.mass)
    elif skipped.fill is Fill.REFER:
        cache.append(layer_idx, layout, key, value, status.present, status.present_masses)
    else:
        shape = (chunk.num_tokens, *key.shape[1:])
        keys, values = key.new_zeros(shape), value.new_zeros(shape)
        keys.index_copy_(0, layout.origin, key)
        values.index_copy_(0, layout.origin, value)
        if skipped.fill is Fill.PROJECT:
            frozen = status.frozen if status.frozen_kv is None else status.frozen_kv
            frozen = layer.attn_norm(frozen.index_select(0, status.halted))
            apply = _linear(layer_idx, status.halted, status, context)
            frozen_key, frozen_value = layer.project_kv(frozen, apply)
            if context.rotation is not None:
                frozen_key = context.rotation.select(status.halted).apply(frozen_key)
            keys.index_copy_(0, status.halted, frozen_key)
            values.index_copy_(0, status.halted, frozen_value)
            context.trace.layers[layer_idx].fill_rows += frozen.shape[0]
        if status.present is not chunk:
            keys, values = (t.index_select(0, status.present.origin) for t in (keys, values))
        cache.append(layer_idx, status.present, keys, values, masses=status.present_masses)


def _attend(
    query: Tensor, layout: RaggedLayout, layer_idx: int, scaling: float, skipped: Skipped, context: PassContext
) -> Tensor:
    """Attend within each sequence; return [N, num_heads * head_dim]."""
    outputs, bounds = [], layout.bounds
    skip_below = 0.0 if context.attention is None else context.attention.threshold_in(layer_idx)
    layer_trace = context.trace.layers[layer_idx]
    for seq, length in enumerate(layout.lengths):
        if length == 0:
            continue
        rows = slice(bounds[seq], bounds[seq + 1])
        entries = context.cache.entries(layer_idx, seq)
        attended = ragged_attention(
            query[rows],
            entries.keys,
            entries.values,
            layout.positions[rows],
            entries.positions,
            scaling,
            newest=skipped.fill is Fill.NONE or length == skipped.status.present.lengths[seq],
            backend=context.backend,
            masses=entries.masses,
            skip_below=skip_below,
        )
        layer_trace.attended.add(attended.pairs)
        layer_trace.values_skipped.add(attended.skipped)
        layer_trace.entries_read += entries.keys.shape[0]
        outputs.append(attended.output)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.flatten(1)
