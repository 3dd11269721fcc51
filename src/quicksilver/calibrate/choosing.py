"""Choosing a plan from the frontier, and proving it on text that nothing was chosen on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quicksilver.calibrate.objectives import Objective
from quicksilver.calibrate.scoring import Budget, saved
from quicksilver.calibrate.search import Scored, pareto


@dataclass(frozen=True)
class Verified:
    """What came of verification."""

    chosen: Scored | None  # the candidate that held, None where none did
    row: dict[str, Any] | None  # its figures on the held-out text
    # candidates that did not hold there, with their figures, in the order in which they were tried
    failed: list[tuple[Scored, dict[str, Any]]]


def eligible(candidates: Sequence[Scored], objective: Objective, budget: Budget) -> list[Scored]:
    """Return the frontier's candidates that hold the budget where they were searched, those that save most first."""
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

    Candidates come from the most saved to the least; `score` returns one's figures on the held-out text.
    """
    failed: list[tuple[Scored, dict[str, Any]]] = []
    for candidate in candidates:
        row = score(candidate)
        if budget.holds(row):
            return Verified(candidate, row, failed)
        failed.append((candidate, row))
    return Verified(None, None, failed)
