"""A bar that an engine's figure is held against, and its verdict in words; which bars there are, each benchmark says.

A missed bar is reported; it fails nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Measurement, find
from benchmarks.timing import paired_ratios, summarise


@dataclass(frozen=True)
class Bar:
    """A limit on an engine's figure relative to its baseline's on one task.

    Attributes:
        task: the task.
        engine: the engine held to it.
        limit: what the ratio must reach.
        speed: the ratio is baseline / engine and at least the limit; else engine / baseline and at most it.
        ideal: what arithmetic would allow, in words.
        against: the engine it is compared with; the one that its measurement names where empty.
    """

    task: str
    engine: str
    limit: float
    speed: bool = False
    ideal: str = ""
    against: str = ""


@dataclass(frozen=True)
class Verdict:
    """A bar and the ratio that was measured."""

    bar: Bar
    baseline: str
    ratio: float

    @property
    def passed(self) -> bool:
        """Whether the ratio is on the right side of the limit."""
        return self.ratio >= self.bar.limit if self.bar.speed else self.ratio <= self.bar.limit

    @property
    def quantity(self) -> str:
        """What the ratio is of."""
        bar = self.bar
        return f"{self.baseline} / {bar.engine}" if bar.speed else f"{bar.engine} / {self.baseline}"

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-ready values."""
        bound = "at least" if self.bar.speed else "at most"
        return {
            "quantity": self.quantity,
            "ratio": self.ratio,
            "bound": bound,
            "limit": self.bar.limit,
            "passed": self.passed,
        }

    def __str__(self) -> str:
        bar = self.bar
        bound = f"at least {bar.limit:.2f}" if bar.speed else f"at most {bar.limit:.2f}"
        ideal = f" ({bar.ideal})" if bar.ideal else ""
        return f"{'pass' if self.passed else 'MISSED'}: {self.quantity} = {self.ratio:.3f}, bar {bound}{ideal}"


def verdict(bar: Bar, measurements: Sequence[Measurement]) -> Verdict:
    """Return what the measurements say of a bar; ratios are taken within rounds, and their median counts."""
    engine = find(measurements, bar.task, bar.engine)
    baseline = find(measurements, bar.task, bar.against or engine.baseline)
    above, below = (baseline, engine) if bar.speed else (engine, baseline)
    return Verdict(bar, baseline.engine, summarise(paired_ratios(above.values, below.values)).median)
