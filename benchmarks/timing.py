"""Seconds of several cases run in turn in one process, and the ratios between them.

What the cases do, and where the figures go, is the caller's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        name: unique among the cases timed together.
        prepare: makes what `run` needs; not timed.
        run: called with what `prepare` returned; timed.
    """

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], None]


class Summary(NamedTuple):
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float


def interleaved(cases: Sequence[Case], repeats: int, warmup: int) -> dict[str, list[float]]:
    """Run the cases in turn (A B C A B C ...) and time them.

    Args:
        cases: what to time, in order.
        repeats: timed rounds.
        warmup: rounds before them, timed by nobody.

    Returns:
        Seconds of each case by name, one figure per round, so that figures of one round are pairs.
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for round_idx in range(warmup + repeats):
        for case in cases:
            elapsed = _time(case)
            if round_idx >= warmup:
                seconds[case.name].append(elapsed)
    return seconds


def summarise(values: Sequence[float]) -> Summary:
    """Return the median and the range of the values."""
    return Summary(statistics.median(values), min(values), max(values))


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of each round's two figures; what slows a whole round cancels."""
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def _time(case: Case) -> float:
    state = case.prepare()
    start = time.perf_counter()
    case.run(state)
    return time.perf_counter() - start
