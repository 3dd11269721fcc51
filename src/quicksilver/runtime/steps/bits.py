"""Bits by token: after one layer, each token that runs on is granted the bits that it reads from there."""

import torch

from quicksilver.backends.state import PassContext, State
from quicksilver.core.bits import MAX_BITS
from quicksilver.core.decisions import TokenBitsView
from quicksilver.families.spec import Adapter
from quicksilver.rules import PrecisionRule
from quicksilver.rules.registry import guarded


class BitsStep:
    """A rule that grants whole tokens bits after a layer, bound to a model whose head it may consult."""

    def __init__(self, adapter: Adapter, rule: PrecisionRule, after: int) -> None:
        self._adapter, self._rule = adapter, rule
        self.layers = (after,)

    def __call__(self, layer_idx: int, state: State, context: PassContext) -> None:
        if not len(state.hidden):
            return
        view = TokenBitsView(state.hidden, self._adapter.head_entropy)
        choice = self._rule.checked(guarded(self._rule.decide_tokens, view), view)
        context.trace.add_signals(layer_idx, choice.signal_rows, choice.macs)
        most = state.max_bits
        if most is None:
            count = state.chunk.num_tokens
            most = torch.full((count,), MAX_BITS, dtype=torch.uint8, device=state.hidden.device)
        state.max_bits = most.index_copy(0, state.layout.origin, choice.bits)  # type: ignore[arg-type]
