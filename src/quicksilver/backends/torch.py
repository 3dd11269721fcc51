"""PyTorch, layer by layer: what a layer is, for the tokens that run it and for those that only leave entries in it.

This is the definition; compiled kernels do the same, several layers at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import call

import torch
from torch import Tensor

from quicksilver.backends.maps import MapReader
from quicksilver.backends.resolved import BoundShortcut, ResolvedPlan
from quicksilver.backends.state import PassContext, State
from quicksilver.cache import append_rows
from quicksilver.core.bits import ENTRY_BITS
from quicksilver.core.decisions import Fill, ShortcutView
from quicksilver.core.ragged import RaggedLayout
from quicksilver.core.trace import COUNT
from quicksilver.families.spec import Adapter, Apply
from quicksilver.ops import AttentionBackend, ragged_attention

_QUERY_ROWS, _FILL_ROWS, _ENTRIES_READ = COUNT["query_rows"], COUNT["fill_rows"], COUNT["entries_read"]
_ENTRY, _QUERY = COUNT["signal_entry"], COUNT["signal_query"]
_ATTENDED = COUNT["attended"]
_SKIPPED = tuple(COUNT[name] for name in ("values_skipped", "scores_skipped", "scored_twice"))
_PLAIN: Apply = call  # type: ignore[assignment]  # no function of ours stands between a layer and a plain module


@dataclass(frozen=True)
class Split:
    """The rows of a sublayer's input that a fitted map stands in for, at least one, and those that run it."""

    skipped: Tensor  # [T] rows that skip the sublayer, ascending
    computed: Tensor  # [M] rows that run it, ascending
    mapped: Tensor  # [T, d] what the map adds to the rows that skip

    def join(self, ran: Tensor) -> Tensor:
        """Return what is added to all rows, [N, d], given what the sublayer adds to those that run it, [M, d]."""
        joined = ran.new_empty((len(self.skipped) + len(self.computed), ran.shape[1]))
        return joined.index_copy_(0, self.skipped, self.mapped).index_copy_(0, self.computed, ran)


class TorchBackend:
    """Runs one layer at a time by the model's own modules; `reason` says why no faster backend does."""

    name = "pytorch"

    def __init__(self, adapter: Adapter, plan: ResolvedPlan, attention: AttentionBackend, reason: str | None) -> None:
        self._layers, self._plan, self.reason = adapter.layers, plan, reason
        self._attention: AttentionBackend = attention
        self._maps = MapReader(adapter, plan) if adapter.spec.is_quantized else None

    def __repr__(self) -> str:
        return "<pytorch backend>" if self.reason is None else f"<pytorch backend: {self.reason}>"

    def spans(self, state: State, context: PassContext) -> Iterator[range]:
        for layer_idx in range(len(self._layers)):
            if len(state.hidden) or self._plan.fills:
                yield range(layer_idx, layer_idx + 1)

    def run(self, span: range, state: State, context: PassContext) -> None:
        for layer_idx in span:
            if len(state.hidden):
                self._run_layer(layer_idx, state, context)
            else:
                self._fill(layer_idx, state, context)

    def _run_layer(self, layer_idx: int, state: State, context: PassContext) -> None:
        layer, plan = self._layers[layer_idx], self._plan.layers[layer_idx]
        context.trace.rows[layer_idx, _QUERY_ROWS] += len(state.hidden)
        apply = self._apply(layer_idx, state.layout.origin, state, context)
        state.before = hidden = state.hidden
        hidden = hidden + self._attend(layer_idx, apply, state, context)
        normed = layer.mlp_norm(hidden)
        split = None
        if plan.mlp is not None:
            split = _split(plan.mlp, layer_idx, normed, hidden, state.layout.origin, context)
        if split is None:
            state.hidden = hidden + layer.mlp(normed, apply)
        elif len(split.computed) == 0:
            state.hidden = hidden + split.mapped
        else:
            apply = self._apply(layer_idx, state.layout.origin.index_select(0, split.computed), state, context)
            state.hidden = hidden + split.join(layer.mlp(normed.index_select(0, split.computed), apply))

    def _attend(self, layer_idx: int, apply: Apply, state: State, context: PassContext) -> Tensor:
        """Write the layer's entries; return what attention adds to the running rows."""
        layer, plan, layout = self._layers[layer_idx], self._plan.layers[layer_idx], state.layout
        rotary = layer.spec.rotary
        rotation = None if rotary is None else state.rotations[rotary]
        normed = layer.attn_norm(state.hidden)
        split, query_apply = None, apply
        if plan.attention is not None:
            split = _split(plan.attention, layer_idx, normed, state.hidden, layout.origin, context)
        if split is None:
            query, key, value = layer.project(0, 3, normed, apply)
            asking, asking_rotation = layout, rotation
        else:
            asking = layout.select(split.computed)
            asking_rotation = None if rotation is None else rotation.select(split.computed)
            query_apply = self._apply(layer_idx, asking.origin, state, context)
            key, value = layer.project(1, 3, normed, apply)
            query = key[:0]
            if len(split.computed):
                (query,) = layer.project(0, 1, normed[split.computed], query_apply)
        self._write(layer_idx, key if rotation is None else rotation.apply(key), value, state, context)
        if split is not None and len(split.computed) == 0:
            return split.mapped
        query = query if asking_rotation is None else asking_rotation.apply(query)
        added = layer.attn_output(self._attention_of(layer_idx, query, asking, state, context), query_apply)
        return added if split is None else split.join(added)

    def _apply(self, layer_idx: int, origins: Tensor, state: State, context: PassContext) -> Apply:
        """Return the function that applies a layer's maps to rows of the tokens `origins` ([M])."""
        if self._maps is None:
            return _PLAIN
        return self._maps.bound(layer_idx, origins, state.max_bits, context)

    def _write(self, layer_idx: int, key: Tensor, value: Tensor, state: State, context: PassContext) -> None:
        """Write running tokens' keys and values and, as the fill says, halted tokens', in order of position."""
        row, fill = context.trace.rows[layer_idx], self._plan.layers[layer_idx].fill
        coded = self._plan.entry_bits == ENTRY_BITS
        if coded:
            row[_ENTRY] += key.shape[0]
        if state.halted is None or fill is Fill.NONE:
            masses = None if state.masses is None else state.mass
            self._append(layer_idx, state.layout, key, value, masses, context)
            return
        keys, values = (t.new_zeros((state.chunk.num_tokens, *t.shape[1:])) for t in (key, value))
        keys.index_copy_(0, state.layout.origin, key)
        values.index_copy_(0, state.layout.origin, value)
        if fill is Fill.PROJECT:
            frozen_key, frozen_value = self._project(layer_idx, state, context)
            keys.index_copy_(0, state.halted, frozen_key)
            values.index_copy_(0, state.halted, frozen_value)
            row[_FILL_ROWS] += len(state.halted)
            if coded:
                row[_ENTRY] += len(state.halted)
        if state.present is not state.chunk:
            keys, values = (t.index_select(0, state.present.origin) for t in (keys, values))
        masses = None if state.masses is None else state.masses.index_select(0, state.present.origin)
        self._append(layer_idx, state.present, keys, values, masses, context)

    def _append(
        self,
        layer_idx: int,
        layout: RaggedLayout,
        keys: Tensor,
        values: Tensor,
        masses: Tensor | None,
        context: PassContext,
    ) -> None:
        """Keep entries, keys less what they have in common where they are kept in few bits."""
        centre = self._plan.layers[layer_idx].key_centre
        keys = keys if centre is None else keys - centre.to(keys.device, keys.dtype)
        append_rows(context.caches, layer_idx, layout, keys, values, masses)

    def _project(self, layer_idx: int, state: State, context: PassContext) -> tuple[Tensor, Tensor]:
        """Return keys and values of halted tokens, of the states with which they halted."""
        assert state.halted is not None
        assert state.frozen is not None
        layer = self._layers[layer_idx]
        normed = layer.attn_norm(state.frozen.index_select(0, state.halted))
        key, value = layer.project(1, 3, normed, self._apply(layer_idx, state.halted, state, context))
        if (rotary := layer.spec.rotary) is not None:
            key = context.rotations[rotary].select(state.halted).apply(key)
        return key, value

    def _fill(self, layer_idx: int, state: State, context: PassContext) -> None:
        """Write the entries of a layer that no token runs."""
        if self._plan.layers[layer_idx].fill is not Fill.NONE:
            shape = context.caches[0].shape
            none = torch.empty((0, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype, device=shape.device)
            self._write(layer_idx, none, none, state, context)

    def _attention_of(
        self, layer_idx: int, query: Tensor, asking: RaggedLayout, state: State, context: PassContext
    ) -> Tensor:
        """Attend within each sequence, for running tokens that `asking` lists; return [N, num_heads * head_dim]."""
        plan, trace, outputs, start = self._plan.layers[layer_idx], context.trace, [], 0
        spec = self._layers[layer_idx].spec
        written = state.layout if plan.fill is Fill.NONE else state.present
        row = trace.rows[layer_idx]
        if plan.skip_below > 0.0:
            row[_QUERY] += query.shape[0]
        for seq, length in enumerate(asking.lengths):
            if length == 0:
                continue
            rows, start = slice(start, start + length), start + length
            entries = context.caches[seq].entries(layer_idx)
            upto = context.caches[seq].length + state.chunk.lengths[seq]  # tokens there are by the end of the pass
            attended = ragged_attention(
                query[rows],
                entries.keys,
                entries.values,
                asking.positions[rows],
                entries.positions,
                spec.scaling,
                newest=length == written.lengths[seq],
                backend=self._attention,
                masses=entries.masses,
                skip_below=plan.skip_below,
                estimate_dims_above=plan.estimate_dims_above,
                window=spec.window if spec.window is not None and spec.window < upto else None,
                softcap=spec.softcap,
            )
            row[_ENTRIES_READ] += attended.entries
            if type(attended.pairs) is int:
                row[_ATTENDED] += attended.pairs
            else:
                trace.add(layer_idx, _ATTENDED, attended.pairs)
            if plan.skip_below > 0.0:
                for count, skipped in zip(_SKIPPED, attended.skipped, strict=True):
                    trace.add(layer_idx, count, skipped)
            outputs.append(attended.output)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.flatten(1)


def _split(
    shortcut: BoundShortcut, layer_idx: int, normed: Tensor, state: Tensor, origins: Tensor, context: PassContext
) -> Split | None:
    """Return which of rows [M], normed [M, d], skip a sublayer by its shortcut; None where all run it."""
    protected = context.protected.shortcuts
    protected = None if protected is None else protected.index_select(0, origins)
    decision = shortcut.shortcut.decide(shortcut.gate, ShortcutView(normed, state, protected))
    skipped = decision.take.nonzero().squeeze(-1)
    shortcut.record(context.trace, layer_idx, skipped.shape[0], decision.gate_rows)
    if skipped.shape[0] == 0:
        return None
    computed = decision.take.argsort(stable=True)[: normed.shape[0] - skipped.shape[0]]  # False first
    mapped = shortcut.fitted(normed if computed.shape[0] == 0 else normed.index_select(0, skipped))
    return Split(skipped, computed, mapped)
