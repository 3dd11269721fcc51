"""What the compiled kernels count in layers, added to a trace as `block.py` would have counted it.

Which layers they run is `spans.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from quicksilver.core.bits import ENTRY_BITS, MAX_WIDTH
from quicksilver.core.trace import LayerTrace
from quicksilver.families.spec import LayerOps, ModelSpec
from quicksilver.ops import native
from quicksilver.plan import Plan
from quicksilver.rules import Part, threshold_at
from quicksilver.runtime.precision import PrecisionStep
from quicksilver.runtime.shortcuts import ShortcutStep

_PARTS: tuple[Part, ...] = get_args(Part)
_WIDTHS = MAX_WIDTH + 1


class KernelCounts:
    """What the kernels count for one trace, until somebody reads it.

    Attributes:
        counts: [layers, counts] int64.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        layers: Sequence[LayerOps],
        precision_step: PrecisionStep,
        shortcut_step: ShortcutStep,
    ) -> None:
        self._plan, self._layers = plan, layers
        self._precision, self._shortcuts = precision_step, shortcut_step
        kernels = native.extension()
        self._places, self._maps = kernels.LAYER_COUNTS, kernels.MAPS
        self.counts = torch.zeros((spec.num_layers, kernels.NUM_LAYER_COUNTS), dtype=torch.int64)

    def address(self, layer_idx: int) -> int:
        """Return where a layer's counts lie."""
        return self.counts.data_ptr() + layer_idx * self.counts.stride(0) * self.counts.element_size()

    def settle(self, layers: Sequence[LayerTrace]) -> None:
        """Add what has been counted; called once."""
        for layer_idx, (trace, numbers) in enumerate(zip(layers, self.counts.tolist(), strict=True)):
            counted = {name: numbers[place] for name, place in self._places.items()}
            widths = numbers[self._places["widths"] :]
            self._settle_rows(trace, counted)
            self._settle_maps(layer_idx, trace, widths, counted["asking_rows"])
            self._settle_shortcuts(layer_idx, trace, counted)

    def _settle_rows(self, trace: LayerTrace, counted: dict[str, int]) -> None:
        trace.query_rows += counted["query_rows"]
        trace.fill_rows += counted["fill_rows"]
        trace.entries_read += counted["entries_read"]
        trace.attended.add(counted["pairs"])
        trace.values_skipped.add(counted["values_skipped"])
        trace.scores_skipped.add(counted["scores_skipped"])
        trace.scored_twice.add(counted["scored_twice"])
        if self._plan.kv.bits == ENTRY_BITS:
            trace.signal_rows["entry"] += counted["query_rows"] + counted["fill_rows"]

    def _settle_maps(self, layer_idx: int, trace: LayerTrace, widths: list[int], asking_rows: int) -> None:
        rule = None if self._plan.precision is None else self._plan.precision.rule
        ops = self._layers[layer_idx]
        bits = None if rule is None else rule.kernel_bits(layer_idx, 0, len(ops.nested))
        for role, module in zip(ops.leaves.roles, ops.nested, strict=True):
            at = self._maps[role] * _WIDTHS
            by_width = widths[at : at + _WIDTHS]
            trace.widths.add(by_width, module.num_outputs, module.channel_bytes)
            if bits is not None and bits.thresholds:
                trace.signal_rows["score"] += sum(by_width)
            centre = self._precision.centre(module)
            if centre is not None:
                nbytes = sum(t.nbytes for t in centre.bind(module.channel_norms))
                trace.record_fitted(sum(by_width) // module.num_inputs, 0, nbytes)
        kv = self._plan.kv
        if any(threshold_at(limit, layer_idx) > 0.0 for limit in (kv.drop_query_dims_below, kv.screen_keys_below)):
            trace.signal_rows["query"] += asking_rows

    def _settle_shortcuts(self, layer_idx: int, trace: LayerTrace, counted: dict[str, int]) -> None:
        for part in _PARTS:
            bound = self._shortcuts.bound(layer_idx, part)
            if bound is not None:
                bound.record(trace, part, counted[f"past_{part}"], counted[f"gated_{part}"])
