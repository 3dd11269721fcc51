"""The paper's literal rules, their two thresholds tuned by the same search: the baseline to be beaten."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial
from torch import Tensor

from quicksilver.calibrate.observe import PROTECTED, layer_states
from quicksilver.calibrate.trials import Space
from quicksilver.families.spec import Adapter
from quicksilver.plan import Plan
from quicksilver.rules import AllRule, DriftRule, EntropyRule, HaltingConfig

_ENTROPIES = (0.05, 8.0)  # bits
_LOWEST, _HIGHEST = 0.001, 0.5  # quantiles of the drift between which its threshold is sought
_GUIDED_SHARES = (0.01, 0.1)
_GUIDED_ENTROPY = 1.15  # bits, as published


class PaperSearch:
    """What to try next of drift and entropy below a threshold each, all else as published; a window shows drifts."""

    def __init__(self, adapter: Adapter, window: Tensor) -> None:
        states = layer_states(adapter, window)
        steps = ((b.float() - a.float())[PROTECTED:] for a, b in itertools.pairwise(states))
        drifts = torch.cat([step.norm(dim=-1) for step in steps])
        self._quantile = lambda share: float(torch.quantile(drifts, share))

    def propose(self, finished: Sequence[FrozenTrial]) -> tuple[Space, dict[str, Any] | None]:
        """Return the space of the next trial, and its parameters where they are not Optuna's to choose."""
        space: Space = {
            "drift": FloatDistribution(self._quantile(_LOWEST), self._quantile(_HIGHEST), log=True),
            "entropy": FloatDistribution(*_ENTROPIES, log=True),
        }
        if len(finished) >= len(_GUIDED_SHARES):
            return space, None
        return space, {"drift": self._quantile(_GUIDED_SHARES[len(finished)]), "entropy": _GUIDED_ENTROPY}

    @staticmethod
    def plan(parameters: dict[str, Any]) -> Plan:
        """Return the plan of a trial's parameters: preset `paper` with other thresholds."""
        rule = AllRule((DriftRule(parameters["drift"]), EntropyRule(parameters["entropy"])))
        return Plan("paper, tuned", HaltingConfig(rule, min_layer=1, protect_first=0, protect_special=True))
