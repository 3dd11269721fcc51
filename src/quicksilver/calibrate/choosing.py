"""Choosing a plan from the frontier, and proving it on text that nothing was chosen on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quicksilver.calibrate.objectives import Objective
from quicksilver.calibrate.scoring import Budget, saved
from quicksilver.calibrate.search import Scored, pareto


@dataclass(frozen=True)
class Verified:
    """What came of verification.

    Attributes:
        chosen: the candidate that held, None where none did.
        row: its figures on the held-out text.
        failed: candidates that did not hold there, with their figures, in the order in which they were tried.
    """

    chosen: Scored | None
    row: dict[str, Any] | None
    failed: list[tuple[Scored, dict[str, Any]]]


def eligible(candidates: Sequence[Scored], objective: Objective, budget: Budget) -> list[Scored]:
    """Return the candidates of the frontier that hold the budget where they were searched and save something.

    They come from the most saved to the least.
    """
    return [
        each
        for each in pareto(candidates, objective, budget)
        if budget.holds(each.row) and saved(each.row, objective) > 0
    ]


def verify(
    candidates: Sequence[Scored],
    budget: Budget,
    score: Callable[[Scored], dict[str, Any]],
) -> Verified:
    """Return the first candidate that holds the budget on held-out text, backing off along the frontier.

    Args:
        candidates: from the most saved to the least.
        budget: its limit must hold for the upper end of the interval.
        score: returns a candidate's figures on the held-out text.
    """
    failed: list[tuple[Scored, dict[str, Any]]] = []
    for candidate in candidates:
        row = score(candidate)
        if budget.holds(row):
            return Verified(candidate, row, failed)
        failed.append((candidate, row))
    return Verified(None, None, failed)
