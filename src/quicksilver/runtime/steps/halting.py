"""Halting between two layers: ask the rule, respect what is protected."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from quicksilver.backends.state import PassContext, SplitRows, State, Stop
from quicksilver.core.decisions import LayerView
from quicksilver.core.trace import Trace
from quicksilver.families.spec import Adapter
from quicksilver.plan.affine import AffineMap
from quicksilver.rules import HaltingConfig
from quicksilver.rules.registry import guarded


class HaltingStep:
    """A halting configuration with a rule, bound to a model whose head some rules consult, and gates by layer.

    `fuses`: tokens take one another's places in the plan. `layers` are the indices of the layers after which the rule
    is asked, or whose update it will ask for.
    """

    def __init__(self, adapter: Adapter, config: HaltingConfig, gates: Mapping[int, Tensor], fuses: bool) -> None:
        assert config.rule is not None
        self._adapter, self._rule, self._gates = adapter, config.rule, gates
        self._keeps_updates = config.rule.reads_previous_update
        first, num_layers = config.first_halt(adapter.spec.num_layers), adapter.spec.num_layers
        known = None if fuses else first
        self._asked = tuple(i for i in range(first, num_layers - 1) if guarded(config.rule.may_halt, i, known))
        self.layers = self._asked
        if self._keeps_updates and self._asked:
            self.layers = tuple(range(max(self._asked[0] - 1, 0), num_layers - 1))

    def __call__(self, layer_idx: int, state: State, context: PassContext) -> None:
        if not len(state.hidden):
            return
        split = self._decide(layer_idx, state, context) if layer_idx in self._asked else None
        if self._keeps_updates and state.before is not None:
            state.update = state.hidden - state.before
        if split is not None:
            state.halt(layer_idx, split)

    def _decide(self, layer_idx: int, state: State, context: PassContext) -> SplitRows | None:
        """Return the rows that halt after a layer and those that go on, None where none halts."""
        layout, trace, gate, protected = state.layout, context.trace, self._gates.get(layer_idx), context.protected
        assert state.before is not None
        assert protected.halting is not None
        view = LayerView(
            layer_idx,
            state.before,
            state.hidden,
            state.update,
            layout.positions,
            context.token_ids.index_select(0, layout.origin),
            self._adapter.head_entropy,
            gate,
        )
        decision = self._rule.ask(view)
        if gate is not None:
            trace.record_fitted(layer_idx, decision.gate_rows, gate.numel(), gate.nbytes)
        halt = decision.halt & ~protected.halting.index_select(0, layout.origin)
        rows = halt.nonzero().squeeze(-1)
        trace.add_signals(layer_idx, decision.signal_rows, decision.macs)
        trace.record_halt(layer_idx, layout.origin.index_select(0, rows))
        if rows.shape[0] == 0:
            return None
        going_on = halt.shape[0] - rows.shape[0]
        return SplitRows(rows, halt.argsort(stable=True)[:going_on])  # False first; the device is not asked again


def map_stopped(maps: Mapping[int, AffineMap], hidden: Tensor, stops: Sequence[Stop], trace: Trace) -> Tensor:
    """Map the states [N, d] of tokens that stopped, in place, by the map of the layer after which they did.

    Every one is mapped, a prompt's too: callers may read what they predict.
    """
    for layer_idx, origins in stops:
        if layer_idx in maps:
            layer_map, rows = maps[layer_idx], hidden.index_select(0, origins)
            trace.record_fitted(layer_idx, len(rows), layer_map.macs, layer_map.nbytes)
            hidden.index_copy_(0, origins, rows + layer_map(rows))
    return hidden
