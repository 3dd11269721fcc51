"""Fitted gates: what a regression on calibration text predicts that halting would cost."""

import math
from dataclasses import dataclass
from typing import ClassVar

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.rules.checks import threshold_at
from quicksilver.rules.halting.base import ThresholdRule, halting_rule


@halting_rule("fitted")
@dataclass(frozen=True)
class FittedRule(ThresholdRule):
    """What a fitted gate predicts that halting would cost, in nats: KL(full prediction || the halted token's).

    The gates are the plan's tensors `gate.LAYER.weight`, [d + 4]: of the state over its root mean square, of the
    logarithm of the relative update's norm, of the cosine of successive updates, of the logarithm of the state's
    norm, and a constant; their product is the logarithm of the nats. A layer without a gate halts nobody.
    """

    reads_gates: ClassVar[bool] = True
    reads_previous_update: ClassVar[bool] = True  # for the cosine of successive updates

    def decide(self, view: LayerView) -> HaltDecision:
        from quicksilver.core import signals

        if view.gate is None:
            return HaltDecision(signals.nobody(view))
        features = signals.gate_features(view.before, view.after, view.previous_update)
        log_nats = features @ view.gate[:-1] + view.gate[-1]  # [N]
        threshold, rows = threshold_at(self.threshold, view.layer_idx), view.num_rows
        limit = math.log(threshold) if threshold > 0.0 else -math.inf
        costs = {"norm": 3 * rows} if view.previous_update is None else {"norm": 3 * rows, "cosine": rows}
        return HaltDecision(log_nats < limit, costs, gate_rows=rows)
