"""The search: guided candidates first, then Optuna's, all scored on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from quicksilver.calibrate.candidates import FILLS, Candidate
from quicksilver.calibrate.mechanisms import Mechanism
from quicksilver.calibrate.objectives import Objective
from quicksilver.calibrate.scoring import Budget, saved
from quicksilver.calibrate.trials import Space

ALONE = (0.35,)
"""Prices that each mechanism is tried at alone: nats that all of a dense token's work is worth."""

TOGETHER = (0.05, 0.12, 0.25, 0.5, 1.0)
"""Prices that all of them are tried at together."""

ROUGH = "rough"
"""Parameter of trials that are scored on a few windows only: they say where to look, and are no candidates."""

SWITCHES: tuple[Mechanism, ...] = ("entries",)
"""Mechanisms that are on or off and have no price; what they do alone is known before the search."""

_STEPS = (0.4, 2.5)  # that one mechanism's price is multiplied by, at the price that meets the budget
_BALANCED = (0.75, 1.0)  # of that price, tried where every mechanism is stepped as far as it pays
_GIVEN_UP = 3.0  # times the budget that a trial is taken to lose which was given up
_PRICES = (1e-4, 1e2)
_LEVELS = (0.6, 2.0)  # of that price, tried by Optuna
_NEARBY = (1.06, 1.03, 0.97, 0.94)  # of the best candidate's price, tried last: to gain a little, to fall back to
_FACTORS = (0.125, 8.0)
_COSINES = (0.6, 0.99)


@dataclass(frozen=True)
class Scored:
    """A candidate and its figures.

    Attributes:
        group: "together", the mechanism that it tries alone, or the baseline that it is.
        row: figures as `eval --json` has them, its plan included.
        candidate: what its plan was made of; None for a baseline.
    """

    group: str
    row: dict[str, Any]
    candidate: Candidate | None = None


class Search:
    """What to try, given what was tried: thresholds of all mechanisms.

    Args:
        mechanisms: that may be used.
        budget: what may be lost.
        objective: what is to be saved.
        fills: whether what a halted token leaves in deeper layers is to be chosen too.
        trials: how many there will be; the last few polish the best.
        always: mechanisms beside these that every candidate of several mechanisms has.
    """

    def __init__(
        self,
        mechanisms: Sequence[Mechanism],
        budget: Budget,
        objective: Objective,
        fills: bool,
        trials: int,
        always: Sequence[Mechanism] = (),
    ) -> None:
        self._mechanisms, self._budget = tuple(mechanisms), budget
        self._objective: Objective = objective
        self._alone: list[Mechanism] = [name for name in self._mechanisms if name not in SWITCHES]
        self._trials, self._always = trials, tuple(always)
        self._fills = fills and "halting" in self._mechanisms

    def propose(self, finished: Sequence[FrozenTrial]) -> tuple[Space, dict[str, Any] | None]:
        """Return the space of the next trial, and its parameters where they are not Optuna's to choose."""
        guided = self._guided(finished) or self._polished(finished)
        if guided is None:
            return {"level": FloatDistribution(*_LEVELS, log=True), **self._space()}, None
        space: Space = {"price": FloatDistribution(*_PRICES, log=True), **self._space()}
        if len(finished) in self._steps:
            space[ROUGH] = CategoricalDistribution((True,))
        return space, self._parameters(guided)

    def candidate(self, parameters: dict[str, Any], finished: Sequence[FrozenTrial]) -> Candidate:
        """Return the candidate of a trial's parameters, given at least the guided trials before it."""
        factors: dict[Mechanism, float] = {
            name: parameters.get(name, 1.0) for name in self._mechanisms if parameters[f"use_{name}"]
        }
        if len(factors) > 1:
            factors |= dict.fromkeys(self._always, 1.0)
        level = parameters.get("level")
        nats_per_work = parameters["price"] if level is None else level * self._base_price(finished)
        return Candidate(nats_per_work, factors, parameters.get("fill", "propagate"))

    def scored(self, finished: Sequence[FrozenTrial]) -> Iterator[Scored]:
        """Return all candidates that were scored in full, on all windows, in the order of the trials."""
        for trial in finished:
            if trial.state == TrialState.COMPLETE and ROUGH not in trial.params:
                candidate = self.candidate(trial.params, finished)
                group = next(iter(candidate.factors), "together") if len(candidate.factors) == 1 else "together"
                yield Scored(group, trial.user_attrs["row"], candidate)

    @property
    def _priced(self) -> list[Mechanism]:
        return [name for name in self._alone if name != "fusion"]

    @property
    def _steps(self) -> range:
        """Which trials make one mechanism cheaper, or dearer."""
        first = len(self._alone) * len(ALONE) + len(TOGETHER)
        return range(first, first + len(_STEPS) * len(self._priced)) if len(self._mechanisms) > 1 else range(0)

    def _guided(self, finished: Sequence[FrozenTrial]) -> Candidate | None:
        """Return what is tried next before Optuna chooses, None where it may.

        First each mechanism alone, then all together at a few prices; then, at the price that meets the budget, each
        mechanism cheaper and dearer, and all of them where those steps say. (The last trials are `_polished`, and leave
        mechanisms out.)
        """
        whole: dict[Mechanism, float] = {name: 0.9 if name == "fusion" else 1.0 for name in self._mechanisms}
        candidates = [
            Candidate(nats_per_work, {mechanism: _cosine_at(i) if mechanism == "fusion" else 1.0})
            for mechanism in self._alone
            for i, nats_per_work in enumerate(ALONE)
        ]
        if len(whole) > 1:
            candidates += [Candidate(nats_per_work, whole) for nats_per_work in TOGETHER]
        if len(finished) >= len(candidates) and len(whole) > 1:
            base = Candidate(self._base_price(finished), whole)
            candidates += [replace(base, factors=whole | {name: step}) for name in self._priced for step in _STEPS]
            if len(finished) >= len(candidates):
                factors = whole | self._balanced(finished[self._steps.start : self._steps.stop])
                prices = [base.nats_per_work * level for level in _BALANCED]
                candidates += [Candidate(nats_per_work, factors) for nats_per_work in prices]
                if len(finished) >= len(candidates):
                    candidates.append(Candidate(self._meeting(finished[self._steps.stop :], prices), factors))
        return candidates[len(finished)] if len(finished) < len(candidates) else None

    def _balanced(self, stepped: Sequence[FrozenTrial]) -> dict[Mechanism, float]:
        """Return a factor for each mechanism from the trials that made it cheaper and dearer, one pair after another.

        Nats are those of divergence, which is known well from few windows. Where a mechanism saves more for a nat
        between its two steps than all of them together, its price rises by as much; where it saves less, it falls.
        """
        gained: dict[Mechanism, float] = {}
        lost: dict[Mechanism, float] = {}
        for i, name in enumerate(self._priced):
            cheaper, dearer = (trial.user_attrs.get("row") for trial in stepped[2 * i : 2 * i + 2])
            if cheaper is not None and dearer is not None:
                gained[name] = saved(dearer, self._objective) - saved(cheaper, self._objective)
                lost[name] = max(dearer["delta"]["kl"] - cheaper["delta"]["kl"], 1e-9)
        if not gained:
            return {}
        mean = max(sum(gained.values()) / sum(lost.values()), 1e-9)
        low, high = _STEPS
        return {name: min(max(gained[name] / lost[name] / mean, low), high) for name in gained}

    def _polished(self, finished: Sequence[FrozenTrial]) -> Candidate | None:
        """Return the best candidate so far at a price nearby, or without one of its mechanisms; None before the end."""
        step = len(finished) - (self._trials - len(self._mechanisms) - len(_NEARBY))
        inside = [each for each in self.scored(finished) if self._budget.holds(each.row) and each.candidate is not None]
        if step < 0 or not inside:
            return None
        best = max(inside, key=lambda each: saved(each.row, self._objective)).candidate
        assert best is not None
        if step < len(_NEARBY):
            return replace(best, nats_per_work=best.nats_per_work * _NEARBY[step])
        without = best.without(self._mechanisms[min(step - len(_NEARBY), len(self._mechanisms) - 1)])
        return (
            without
            if without.factors and without != best
            else replace(best, nats_per_work=best.nats_per_work * _NEARBY[-1] ** 2)
        )

    def _base_price(self, finished: Sequence[FrozenTrial]) -> float:
        """Return the price at which all mechanisms together meet the budget, between the guided trials' prices."""
        if len(self._mechanisms) == 1:
            return self._meeting(finished, ALONE)
        return self._meeting(finished[len(self._alone) * len(ALONE) :], TOGETHER)

    def _meeting(self, trials: Sequence[FrozenTrial], prices: Sequence[float]) -> float:
        """Return the price at which the budget is met, between ascending prices that were tried one after another."""
        below, at_below = prices[0] / 2, 0.0
        for trial, nats_per_work in zip(trials, prices, strict=False):
            row = trial.user_attrs.get("row")
            lost = _GIVEN_UP * self._budget.limit if row is None else self._budget.upper(row)
            if lost > self._budget.limit:
                share = (self._budget.limit - at_below) / (lost - at_below)
                return below * (nats_per_work / below) ** min(max(share, 0.0), 1.0)
            below, at_below = nats_per_work, lost
        return below

    def _space(self) -> Space:
        space: Space = {}
        for mechanism in self._mechanisms:
            if mechanism not in SWITCHES:
                least, most = _COSINES if mechanism == "fusion" else _FACTORS
                space[mechanism] = FloatDistribution(least, most, log=mechanism != "fusion")
            space[f"use_{mechanism}"] = CategoricalDistribution((True, False))
        if self._fills:
            space["fill"] = CategoricalDistribution(tuple(FILLS))
        return space

    def _parameters(self, candidate: Candidate) -> dict[str, Any]:
        parameters: dict[str, Any] = {"price": candidate.nats_per_work}
        for mechanism in self._mechanisms:
            parameters[f"use_{mechanism}"] = mechanism in candidate.factors
            if mechanism not in SWITCHES:
                parameters[mechanism] = candidate.factors.get(mechanism, 0.9 if mechanism == "fusion" else 1.0)
        if self._fills:
            parameters["fill"] = candidate.fill
        return parameters


def _cosine_at(step: int) -> float:
    """Return a threshold of fusion for a step of the prices tried alone: the dearer, the more alike tokens must be."""
    low, high = _COSINES
    return high - (high - low) * (step + 1) / (len(ALONE) + 1)


def pareto(candidates: Sequence[Scored], objective: Objective, budget: Budget) -> list[Scored]:
    """Return the candidates that no other beats in both what is lost (the interval's upper end) and what is saved.

    They come from the most saved to the least.
    """
    ordered = sorted(candidates, key=lambda each: (-saved(each.row, objective), budget.upper(each.row)))
    best, lost = [], math.inf
    for each in ordered:
        if budget.upper(each.row) < lost:
            best.append(each)
            lost = budget.upper(each.row)
    return best
