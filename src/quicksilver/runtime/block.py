"""One decoder layer over a ragged batch: the tokens that run it, and what is written for those that do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quicksilver.cache import append_rows
from quicksilver.core.decisions import Fill
from quicksilver.core.ragged import RaggedLayout, TokenState
from quicksilver.families.spec import Apply, LayerOps
from quicksilver.ops import ragged_attention
from quicksilver.rules.maps import Part
from quicksilver.runtime.context import PassContext
from quicksilver.runtime.shortcuts import Detour
from quicksilver.runtime.status import Running, TokenStatus


@dataclass(frozen=True)
class Skipped:
    """How the tokens that a layer does not run stand, and how their entries in it come about."""

    status: TokenStatus
    fill: Fill


def run_layer(layer: LayerOps, layer_idx: int, running: Running, skipped: Skipped, context: PassContext) -> Running:
    """Run a layer for the running tokens; write its entries; return the tokens as they leave it.

    Args:
        layer: its leaf operations.
        layer_idx: its index.
        running: the tokens that run it.
        skipped: the others.
        context: of the pass.
    """
    state = running.state
    hidden = state.hidden + _attention(layer, layer_idx, running, skipped, context)
    hidden = hidden + _mlp(layer, layer_idx, hidden, state.layout.origin, skipped.status, context)
    context.trace.at(layer_idx).query_rows += hidden.shape[0]
    return Running(TokenState(hidden, state.layout, state.mass), running.rotation, running.update)


def _attention(layer: LayerOps, layer_idx: int, running: Running, skipped: Skipped, context: PassContext) -> Tensor:
    """Write the layer's entries; return what attention adds to the running rows."""
    state, status = running.state, skipped.status
    normed = layer.attn_norm(state.hidden)
    apply = _linear(layer_idx, state.layout.origin, status, context)
    detour = _detour(layer_idx, "attention", normed, state.hidden, state.layout.origin, context)
    if detour is None:
        asking, query_apply = running, apply
        query, key, value = layer.project_qkv(normed, apply)
    else:
        asking = running.select(detour.through)
        query_apply = _linear(layer_idx, asking.state.layout.origin, status, context)
        key, value = layer.project_kv(normed, apply)
        query = layer.project_query(normed.index_select(0, detour.through), query_apply) if len(asking) else None
    key = key if running.rotation is None else running.rotation.apply(key)
    _write(layer, layer_idx, state, (key, value), skipped, context)
    if query is None:
        assert detour is not None  # without one all rows ask
        return detour.mapped
    query = query if asking.rotation is None else asking.rotation.apply(query)
    attended = _attend(query, asking.state.layout, state.layout, layer_idx, layer.scaling, skipped, context)
    added = layer.attn_output(attended, query_apply)
    return added if detour is None else detour.join(added)


def _mlp(
    layer: LayerOps, layer_idx: int, hidden: Tensor, origins: Tensor, status: TokenStatus, context: PassContext
) -> Tensor:
    """Return what the MLP adds to rows [M, d] of the tokens `origins`."""
    normed = layer.mlp_norm(hidden)
    detour = _detour(layer_idx, "mlp", normed, hidden, origins, context)
    if detour is None:
        return layer.mlp(normed, _linear(layer_idx, origins, status, context))
    if len(detour.through) == 0:
        return detour.mapped
    apply = _linear(layer_idx, origins.index_select(0, detour.through), status, context)
    return detour.join(layer.mlp(normed.index_select(0, detour.through), apply))


def _detour(
    layer_idx: int, part: Part, normed: Tensor, state: Tensor, origins: Tensor, context: PassContext
) -> Detour | None:
    """Return which rows go past a sublayer by its shortcut, None where all run it."""
    trace = context.trace.at(layer_idx)
    return context.shortcuts.decide(layer_idx, part, normed, state, origins, context.unshortened, trace)


def fill_layer(layer: LayerOps, layer_idx: int, skipped: Skipped, context: PassContext) -> None:
    """Write the entries of a layer that no token runs."""
    if skipped.fill is Fill.NONE:
        return
    shape = context.caches[0].shape
    none = torch.empty((0, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype, device=shape.device)
    nobody = TokenState(none, context.chunk.select(context.chunk.origin[:0]))
    _write(layer, layer_idx, nobody, (none, none), skipped, context)


def _linear(layer_idx: int, origins: Tensor, status: TokenStatus, context: PassContext) -> Apply:
    """Return the function that applies a layer's maps to rows of the tokens `origins` ([M])."""
    trace = context.trace.at(layer_idx)
    return context.precision.linear(layer_idx, origins, status.caps, context.exempt, trace)


def _write(
    layer: LayerOps,
    layer_idx: int,
    state: TokenState,
    running: tuple[Tensor, Tensor],
    skipped: Skipped,
    context: PassContext,
) -> None:
    """Write running tokens' keys and values and, as the fill says, halted tokens', in order of position."""
    caches, chunk, status, layout = context.caches, context.chunk, skipped.status, state.layout
    key, value = running
    layer_trace, coded = context.trace.at(layer_idx), caches[0].shape.coded
    if coded:
        layer_trace.signal_rows["entry"] += key.shape[0]
    if status.halted is None or status.frozen is None or skipped.fill is Fill.NONE:
        append_rows(caches, layer_idx, layout, key, value, state.mass)
    else:
        shape = (chunk.num_tokens, *key.shape[1:])
        keys, values = key.new_zeros(shape), value.new_zeros(shape)
        keys.index_copy_(0, layout.origin, key)
        values.index_copy_(0, layout.origin, value)
        if skipped.fill is Fill.PROJECT:
            frozen = layer.attn_norm(status.frozen.index_select(0, status.halted))
            apply = _linear(layer_idx, status.halted, status, context)
            frozen_key, frozen_value = layer.project_kv(frozen, apply)
            if context.rotation is not None:
                frozen_key = context.rotation.select(status.halted).apply(frozen_key)
            keys.index_copy_(0, status.halted, frozen_key)
            values.index_copy_(0, status.halted, frozen_value)
            layer_trace.fill_rows += frozen.shape[0]
            if coded:
                layer_trace.signal_rows["entry"] += frozen.shape[0]
        if status.present is not chunk:
            keys, values = (t.index_select(0, status.present.origin) for t in (keys, values))
        append_rows(caches, layer_idx, status.present, keys, values, status.present_masses)


def _attend(
    query: Tensor,
    layout: RaggedLayout,
    running: RaggedLayout,
    layer_idx: int,
    scaling: float,
    skipped: Skipped,
    context: PassContext,
) -> Tensor:
    """Attend within each sequence, for those running tokens that `layout` lists; return [N, num_heads * head_dim]."""
    outputs, bounds = [], layout.bounds
    written = running if skipped.fill is Fill.NONE else skipped.status.present
    skip_below = 0.0 if context.attention is None else context.attention.threshold_in(layer_idx)
    query_below = 0.0 if context.attention is None else context.attention.query_threshold_in(layer_idx)
    screen, layer_trace = context.screen(layer_idx), context.trace.at(layer_idx)
    if query_below > 0.0 or screen is not None:
        layer_trace.signal_rows["query"] += query.shape[0]
    for seq, length in enumerate(layout.lengths):
        if length == 0:
            continue
        rows = slice(bounds[seq], bounds[seq + 1])
        entries = context.caches[seq].entries(layer_idx)
        attended = ragged_attention(
            query[rows],
            entries.keys,
            entries.values,
            layout.positions[rows],
            entries.positions,
            scaling,
            newest=length == written.lengths[seq],
            backend=context.backend,
            masses=entries.masses,
            skip_below=skip_below,
            query_below=query_below,
            screen=screen,
        )
        layer_trace.attended.add(attended.pairs)
        layer_trace.values_skipped.add(attended.values_skipped)
        layer_trace.scores_skipped.add(attended.scores_skipped)
        layer_trace.scored_twice.add(attended.scored_twice)
        layer_trace.entries_read += entries.keys.shape[0]
        outputs.append(attended.output)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.flatten(1)
