"""Rows of a results file: one JSON object per task and engine, with all that is needed to judge its figure.

How the figures were obtained is `timing.py`'s and `memory.py`'s; what they must reach is `verdicts.py`'s.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Summary, paired_ratios, summarise
from quicksilver.measure import environment

_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Measurement:
    """Figures of one engine on one task.

    Attributes:
        task: what was done.
        engine: by whom.
        baseline: the engine it is compared with; itself where it is the baseline.
        unit: of the values: "seconds", "seconds per token", "bytes" or "bytes per second".
        values: one per repetition, in the order they were taken.
        details: further facts of this engine on this task.
    """

    task: str
    engine: str
    baseline: str
    unit: str
    values: tuple[float, ...]
    details: dict[str, Any]


def find(measurements: Sequence[Measurement], task: str, engine: str) -> Measurement:
    """Return the measurement of a task and engine; there is exactly one."""
    (found,) = (m for m in measurements if (m.task, m.engine) == (task, engine))
    return found


def ratio_to_baseline(measurement: Measurement, measurements: Sequence[Measurement]) -> Summary:
    """Return the engine's figure over its baseline's, paired by repetition."""
    baseline = find(measurements, measurement.task, measurement.baseline)
    return summarise(paired_ratios(measurement.values, baseline.values))


def to_rows(
    benchmark: str, measurements: Sequence[Measurement], shared: dict[str, Any], device: torch.device
) -> list[dict[str, Any]]:
    """Return JSON-ready rows; `shared` holds what they have in common beside the provenance."""
    provenance = {**_provenance(device), **shared}
    return [{"benchmark": benchmark, **_figures(m, measurements), **provenance} for m in measurements]


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a JSON-lines file in one write, so that an interrupted run leaves no half line."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with open(path, "ab", buffering=0) as file:
        file.write(lines.encode())


def _figures(measurement: Measurement, measurements: Sequence[Measurement]) -> dict[str, Any]:
    summary = summarise(measurement.values)
    ratio = ratio_to_baseline(measurement, measurements)
    return {
        "task": measurement.task,
        "engine": measurement.engine,
        "unit": measurement.unit,
        "repeats": len(measurement.values),
        "values": list(measurement.values),
        **summary._asdict(),
        "baseline": measurement.baseline,
        "ratio_to_baseline": ratio.median,
        "ratio_range": [ratio.low, ratio.high],
        **measurement.details,
    }


def _provenance(device: torch.device) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment.describe(device),
        "commit": _git("rev-parse", "HEAD"),
        "commit_modified": bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
    }


def _git(*arguments: str) -> str | None:
    """Return what git prints, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
