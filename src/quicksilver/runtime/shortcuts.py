"""Shortcuts inside a layer: ask the policy who goes past a sublayer, apply the fitted map to them, count both.

Who is decided by `quicksilver.rules.halting.shortcuts`; the sublayers run in `block.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quicksilver.core.decisions import ShortcutView
from quicksilver.core.trace import LayerTrace
from quicksilver.families.spec import Adapter
from quicksilver.plan import Plan
from quicksilver.plan.affine import AffineMap
from quicksilver.rules import Part, Shortcut
from quicksilver.runtime.protection import Protection


@dataclass(frozen=True)
class BoundShortcut:
    """A shortcut with its tensors on the model's device: the map in the model's dtype, the gate in float32 or wider."""

    fitted: AffineMap
    gate: Tensor | None
    shortcut: Shortcut

    def record(self, trace: LayerTrace, part: Part, past: int, asked: int) -> None:
        """Count `past` rows that took the shortcut and `asked` rows that its gate was asked about."""
        if self.gate is not None:
            size = self.fitted.bias.shape[0]  # of the state, whose norm is taken
            nbytes = self.gate.numel() * self.gate.element_size()
            trace.record_fitted(asked, self.gate.numel() + size, nbytes)
        trace.shortcut_rows[part] += past
        trace.record_fitted(past, self.fitted.macs, self.fitted.nbytes)


@dataclass(frozen=True)
class Detour:
    """The rows of a sublayer's input that a fitted map stands in for, at least one, and those that run it.

    Attributes:
        past: [T] rows that go past the sublayer, ascending.
        through: [M] rows that run it, ascending.
        mapped: [T, d] what the map adds to the rows that go past.
    """

    past: Tensor
    through: Tensor
    mapped: Tensor

    def join(self, ran: Tensor) -> Tensor:
        """Return what is added to all rows, [N, d], given what the sublayer adds to those that run it, [M, d]."""
        joined = ran.new_empty((len(self.past) + len(self.through), ran.shape[1]))
        return joined.index_copy_(0, self.past, self.mapped).index_copy_(0, self.through, ran)


class ShortcutStep:
    """A configuration of shortcuts bound to a model.

    Args:
        adapter: the model.
        plan: says who may go past which sublayers, and holds the fitted maps and gates.
        special_ids: token ids that are protected where the configuration says so.
    """

    def __init__(self, adapter: Adapter, plan: Plan, special_ids: Sequence[int]) -> None:
        spec, config = adapter.spec, None if not plan.shortcuts else plan.halting.for_shortcuts  # type: ignore[union-attr]
        self._protection = Protection(config, special_ids, spec.device)
        self._bound: dict[tuple[int, Part], BoundShortcut] = {}
        if config is None:
            return
        maps, gates = plan.fitted_maps(spec.num_layers, spec.hidden_size), plan.shortcut_gates(spec.hidden_size)
        wide = torch.promote_types(spec.dtype, torch.float32)
        for shortcut in plan.shortcuts:
            fitted, gate = maps[shortcut.name].to(spec.device, spec.dtype), gates.get(shortcut)
            gate = None if gate is None else gate.to(spec.device, wide)
            self._bound[shortcut.layer, shortcut.part] = BoundShortcut(fitted, gate, shortcut)

    def bound(self, layer_idx: int, part: Part) -> BoundShortcut | None:
        """Return the shortcut past a sublayer, None where there is none."""
        return self._bound.get((layer_idx, part))

    def exempt(self, token_ids: Tensor, positions: Tensor) -> Tensor | None:
        """Return which tokens of a pass run every sublayer, [N] bool; None where none must."""
        covered = self._protection.found(token_ids, positions) if self._bound else None
        if covered is None or not bool(covered.any()):  # the device is asked once, not in every layer
            return None
        return covered

    def decide(
        self,
        layer_idx: int,
        part: Part,
        normed: Tensor,
        state: Tensor,
        origins: Tensor,
        exempt: Tensor | None,
        trace: LayerTrace,
    ) -> Detour | None:
        """Return who goes past a sublayer and what is added to them instead, or None where nobody does.

        Args:
            layer_idx: the layer.
            part: which of its sublayers.
            normed: [M, d] the sublayer's normed input.
            state: [M, d] what it was normed from.
            origins: [M] which of the pass's tokens the rows are.
            exempt: [N] tokens of the pass that run every sublayer, None where none must.
            trace: of the layer.
        """
        bound = self._bound.get((layer_idx, part))
        if bound is None:
            return None
        protected = None if exempt is None else exempt.index_select(0, origins)
        decision = bound.shortcut.decide(bound.gate, ShortcutView(normed, state, protected))
        past = decision.take.nonzero().squeeze(-1)
        bound.record(trace, part, past.shape[0], decision.gate_rows)
        if past.shape[0] == 0:
            return None
        through = decision.take.argsort(stable=True)[: normed.shape[0] - past.shape[0]]  # False first
        mapped = bound.fitted(normed if through.shape[0] == 0 else normed.index_select(0, past))
        return Detour(past, through, mapped)
