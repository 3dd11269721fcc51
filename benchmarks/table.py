"""The table of a run on standard output: figures, ratios, and the bars' verdicts beside them.

The rows for machines are `rows.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import DENSE
from benchmarks.rows import Measurement, find, ratio_to_baseline
from benchmarks.timing import Summary, summarise
from benchmarks.verdicts import Verdict

_WIDTH = 160
_SCALES = {"seconds": (1e3, "ms"), "seconds per token": (1e3, "ms/token"), "bytes": (1e-6, "MB")}


def print_table(
    heading: Sequence[str], measurements: Sequence[Measurement], verdicts: Mapping[tuple[str, str], Verdict]
) -> None:
    """Print the heading's lines and one row per measurement."""
    console = Console(width=_WIDTH)
    for line in heading:
        console.print(line, highlight=False, markup=False)
    table = Table("task", "engine")
    for name in ("median", r"\[min, max]", r"of baseline \[min, max]", "FLOPs", "KV read"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bar")
    previous = None
    for measurement in measurements:
        if previous not in (None, measurement.task):
            table.add_section()
        previous = measurement.task
        verdict = verdicts.get((measurement.task, measurement.engine))
        ratio = ratio_to_baseline(measurement, measurements)
        dense = find(measurements, measurement.task, DENSE)
        bar = "" if verdict is None else str(verdict)
        table.add_row(*_figures(measurement, ratio), *_counts(measurement, dense), bar)
    console.print(table, highlight=False)
    missed = sum(not verdict.passed for verdict in verdicts.values())
    console.print(f"bars: {len(verdicts) - missed} passed, {missed} missed", highlight=False)
    console.print(
        "of baseline: the engine's figure / its baseline's, median over repetitions paired in turn; below 1 is less"
        " time or memory.\nFLOPs, KV read: what ran, and the bytes of keys and values that attention read, / dense's;"
        " counted.",
        highlight=False,
    )


def _figures(measurement: Measurement, ratio: Summary) -> list[str]:
    scale, unit = _SCALES[measurement.unit]
    median, low, high = (value * scale for value in summarise(measurement.values))
    is_baseline = measurement.engine == measurement.baseline
    return [
        measurement.task,
        measurement.engine,
        f"{median:.2f} {unit}",
        f"\\[{low:.2f}, {high:.2f}]",
        "" if is_baseline else f"{ratio.median:.3f} of {measurement.baseline} \\[{ratio.low:.3f}, {ratio.high:.3f}]",
    ]


def _counts(measurement: Measurement, dense: Measurement) -> list[str]:
    """Return the shares of dense's FLOPs and bytes of keys and values, empty where the engine keeps no count."""
    details = measurement.details
    if "flops" not in details:
        return ["", ""]
    kv_read = details["kv_read_bytes_per_token"] / dense.details["kv_read_bytes_per_token"]
    return [f"{details['flops'] / details['dense_flops']:.3f}", f"{kv_read:.3f}"]
