"""The bars that the engine's figures are held against."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.contenders import DENSE, FUSED
from benchmarks.rows import Measurement
from benchmarks.verdicts import Bar, Verdict, verdict

BARS = (
    Bar("prefill", DENSE, 1.0, speed=True),
    Bar("decode", DENSE, 1.0, speed=True),
    Bar("prefill", "half-drop", 0.82, ideal="arithmetic allows 0.75"),
    Bar("prefill", FUSED, 0.75, ideal="arithmetic allows 0.66"),
    Bar("decode", "half-drop", 0.88, ideal="bytes allow 0.83"),
    Bar("memory", DENSE, 1.10),
)


def judge(measurements: Sequence[Measurement]) -> dict[tuple[str, str], Verdict]:
    """Return the verdict of every bar by (task, engine)."""
    return {(bar.task, bar.engine): verdict(bar, measurements) for bar in BARS}
