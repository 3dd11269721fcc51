"""Seconds of several cases run in turn, and the ratios between them.

What the cases do, and where the figures go, is the caller's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    """Run the cases in turn (A B C A B C ...) in this process and time them.

    Args:
        cases: what to time, in order.
        repeats: timed rounds.
        warmup: rounds before them, timed by nobody.

    Returns:
        Seconds of each case by name, as from `in_turn`.
    """
    return in_turn({case.name: partial(_time, case) for case in cases}, repeats, warmup)


def in_turn(turns: Mapping[str, Callable[[], float]], repeats: int, warmup: int) -> dict[str, list[float]]:
    """Call what takes its own time, in turn (A B C A B C ...).

    Args:
        turns: by name, in order; each returns the seconds that it took.
        repeats: rounds that count.
        warmup: rounds before them.

    Returns:
        Seconds by name, one figure per round, so that figures of one round are pairs.
    """
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for round_idx in range(warmup + repeats):
        for name, turn in turns.items():
            elapsed = turn()
            if round_idx >= warmup:
                taken[name].append(elapsed)
    return taken


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def summarise(values: Sequence[float]) -> Summary:
    """Return the median and the range of the values."""
    return Summary(statistics.median(values), min(values), max(values))


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of each round's two figures; what slows a whole round cancels."""
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def _time(case: Case) -> float:
    return seconds(case.run, case.prepare())
