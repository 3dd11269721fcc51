"""What the comparison is held against: closeness to the float model before anything is timed, and bars on seconds.

A missed bar is reported and fails nothing; a missed gate stops the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.gate import GateError
from benchmarks.peers import ours
from benchmarks.peers.engines import CT2, HUGGINGFACE, PEERS, Q4, Q8
from benchmarks.peers.ours import CHANNEL, HALF, MILD, UNIFORM_4, UNIFORM_8
from benchmarks.peers.quality import Quality
from benchmarks.rows import Measurement, find
from benchmarks.timing import paired_ratios, summarise
from benchmarks.verdicts import Bar, Verdict, verdict

STREAMING_READ = "streaming-read"
# Largest `Quality.relative`: root mean square of the logits' difference over their standard deviation. Errors of each
# product add up over the layers: at 8 bits half a percent of each comes to 6 % of the logits of `llama1b`. Logits that
# have nothing to do with the float model's are at 1.41.
TOLERANCES = {
    HUGGINGFACE: 0.05,  # bfloat16 against float32
    Q8: 0.10,
    CT2: 0.15,  # one scale for a row of weights, and one for a token's activations
    Q4: 1.00,
    UNIFORM_8: 0.10,
    UNIFORM_4: 1.00,
    CHANNEL: 0.50,
    ours.CHANNEL_SKIP: 0.50,
    MILD: 0.60,
}
_ALL = (
    Bar("decode", UNIFORM_8, 1.00, speed=True, against=Q8),
    Bar("decode", UNIFORM_4, 1.00, speed=True, against=Q4),
    Bar("prefill", UNIFORM_8, 1.00, speed=True, against=Q8),
)
_BARS: dict[str, tuple[Bar, ...]] = {
    "gpt2": (
        *_ALL,
        Bar("decode", CHANNEL, 1.20, speed=True, against=Q8),
        Bar("decode", UNIFORM_8 + HALF, 1.13, speed=True, against=UNIFORM_8),
        Bar("decode", CHANNEL + HALF, 1.13, speed=True, against=CHANNEL),
    ),
    "llama1b": (
        *_ALL,
        Bar("decode", CHANNEL, 1.35, speed=True, against=Q8),
        Bar("decode", UNIFORM_8 + HALF, 1.22, speed=True, against=UNIFORM_8),
        Bar("decode", CHANNEL + HALF, 1.22, speed=True, against=CHANNEL),
        Bar("decode", UNIFORM_8, 0.80, speed=True, against=f"{STREAMING_READ} of {UNIFORM_8}"),
    ),
    "ref-llama": tuple(Bar("generate", MILD, 1.00, speed=True, against=peer) for peer in PEERS),
}


def check(found: Mapping[str, Quality], what: str = "logits", tolerances: Mapping[str, float] = TOLERANCES) -> None:
    """Raise GateError where engines' logits are further from the float model's than they may be.

    Forced halting has no such limit: what it computes is another function. Its plan without halting is checked, and
    so are the layers it runs.

    Args:
        found: by engine.
        what: was compared, in words.
        tolerances: by engine.
    """
    failed = [
        f"{name}: {what} differ from the float model's by {quality.relative:.3g} of their spread, allowed {limit}"
        for name, quality in found.items()
        if not quality.relative <= (limit := tolerances.get(name, np.inf))  # NaN fails too
    ]
    if failed:
        raise GateError("; ".join(failed))


def ideals(measurements: Sequence[Measurement], weight_bytes: dict[str, float]) -> list[Measurement]:
    """Return, for each engine that decoded, the seconds that reading its weights alone would have taken.

    Args:
        measurements: with the task "bandwidth", one figure for every round of "decode".
        weight_bytes: that each engine reads for a token.
    """
    rates = find(measurements, "bandwidth", STREAMING_READ).values
    decoded = [m for m in measurements if m.task == "decode"]
    made = [
        replace(
            m, engine=f"{STREAMING_READ} of {m.engine}", values=tuple(weight_bytes[m.engine] / rate for rate in rates)
        )
        for m in decoded
    ]
    return [replace(m, baseline=m.engine, details={}) for m in made]


def bandwidth_fraction(engine: str, measurements: Sequence[Measurement], weight_bytes: dict[str, float]) -> float:
    """Return the share of the measured bandwidth at which an engine's weights are read: the median over rounds."""
    own = find(measurements, "decode", engine)
    (ideal,) = (m for m in ideals(measurements, weight_bytes) if m.engine == f"{STREAMING_READ} of {engine}")
    return summarise(paired_ratios(ideal.values, own.values)).median


def judge(subject: str, measurements: Sequence[Measurement], weight_bytes: dict[str, float]) -> list[Verdict]:
    """Return the verdicts of a subject's bars, those whose engines were not measured left out."""
    known = [*measurements, *ideals(measurements, weight_bytes)]
    measured = {(m.task, m.engine) for m in known}
    bars = _BARS.get(subject, ())
    return [verdict(bar, known) for bar in bars if {(bar.task, bar.engine), (bar.task, bar.against)} <= measured]
