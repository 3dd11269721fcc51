"""One subject measured: engines in processes of their own are checked, then timed in turn, and weighed.

Which engines there are is `roster.py`'s, what they must reach `limits.py`'s.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import rows, timing
from benchmarks.memory import peak_rss_bytes
from benchmarks.peers import bandwidth, files, limits, quality, roster
from benchmarks.peers.remote import RemoteEngine
from benchmarks.peers.subjects import Subject
from benchmarks.rows import Measurement

_WARMUP = 1
_SINGLY = 16  # tokens compared that are fed one by one
_DECODED_ALONE = 8  # tokens, where memory is measured
_SETTLE_SECONDS = 0.3  # before each turn: threads of the engine before it spin for up to 0.2 s


@dataclass(frozen=True)
class Settings:
    """Sizes of a run, in tokens, and how it is repeated."""

    threads: int
    rounds: int
    new_tokens: int
    prompt_tokens: int
    prefill_tokens: int
    quality_tokens: int
    quick: bool

    @property
    def context(self) -> int:
        """Tokens that must fit."""
        return max(self.prefill_tokens, self.prompt_tokens, self.quality_tokens) + self.new_tokens


class References(NamedTuple):
    """The float model's logits, computed in float32.

    Attributes:
        tokens: [quality_tokens, vocab], of every token of a text.
        prefill: [1, vocab], of the last token of the prompt that is timed.
    """

    tokens: np.ndarray
    prefill: np.ndarray

    @classmethod
    def of(cls, subject: Subject, settings: Settings, ids: Sequence[int]) -> References:
        """Return a subject's, computed where no run has computed them yet."""
        compared, prefill = ids[: settings.quality_tokens], ids[: settings.prefill_tokens]
        made = ((compared, len(compared)), (prefill, 1))
        return cls(*(files.reference_logits(subject, fed, keep, settings.threads, say) for fed, keep in made))


def measure(
    subject: Subject, names: Sequence[str], settings: Settings, ids: list[int], memory: list[Measurement]
) -> list[dict[str, Any]]:
    """Load a subject's engines, check them, time them in turn, and return the rows.

    Raises:
        GateError: an engine computes something else than it should.
        WorkerError: a process of engines failed or died.
    """
    references = References.of(subject, settings, ids)
    with roster.apart(subject, names, settings.threads, settings.context) as engines:
        check(engines, settings, ids, references)
        seconds = measure_seconds(engines, settings, ids, end_to_end=not subject.is_random)
    weight_bytes = {engine.name: engine.weight_bytes for engine in engines}
    measurements = [*seconds, *(_with_details(m, engines) for m in memory)]
    shared = {
        "model": subject.describe(),
        "peers": roster.versions(),
        "warmup": _WARMUP,
        "settings": {**asdict(settings), "isolated": True},
    }
    measured = rows.to_rows("peers", measurements, shared, torch.device("cpu"))
    verdicts = limits.judge(subject.name, measurements, weight_bytes)
    for row in measured:
        mine = [v for v in verdicts if (v.bar.task, v.bar.engine) == (row["task"], row["engine"])]
        row["bars"] = [{"task": v.bar.task, **v.to_dict()} for v in mine]
        if row["task"] == "decode":
            row["tokens_per_second"] = 1 / row["median"]
            row["bandwidth_fraction"] = limits.bandwidth_fraction(row["engine"], measurements, weight_bytes)
    return measured


def check(
    engines: Sequence[RemoteEngine],
    settings: Settings,
    ids: list[int],
    references: References,
    tolerances: Mapping[str, float] = limits.TOLERANCES,
) -> None:
    """Have engines tuned, hold their logits against the float model's, and keep the figures for their rows.

    Logits of every token are one thing, what `prefill` comes to in the very call that is timed is another: an engine
    that is asked for the last token's logits alone may compute them in another way.

    Raises:
        GateError: an engine's are further from the float model's than they may be.
    """
    tokens, prefill = {}, {}
    for engine in engines:
        engine.tune(ids, settings.prompt_tokens, settings.prefill_tokens)
        found = tokens[engine.name] = quality.compare(
            references.tokens, engine.logits(ids[: settings.quality_tokens], _SINGLY)
        )
        engine.prefill(ids[: settings.prefill_tokens])
        after = prefill[engine.name] = quality.compare(references.prefill, engine.prefilled())
        engine.details |= {"quality": found.to_dict(), "prefill_quality": after.to_dict()}
        say(
            f"gate: {engine.name}: relative error {found.relative:.3g}, KL {found.kl:.3g};"
            f" after the prompt {after.relative:.3g}, {after.kl:.3g}"
        )
    limits.check(tokens, tolerances=tolerances)
    limits.check(prefill, "logits after the prompt that is timed", tolerances)


def measure_seconds(
    engines: Sequence[RemoteEngine], settings: Settings, ids: list[int], end_to_end: bool
) -> list[Measurement]:
    """Time every task on every engine, in turn, and the memory's bandwidth in each round of decoding."""
    prompt, prefill = ids[: settings.prompt_tokens], ids[: settings.prefill_tokens]
    new = settings.new_tokens
    fed = ids[settings.prompt_tokens : settings.prompt_tokens + new]
    read = bandwidth.StreamingRead(bandwidth.QUICK_BYTES if settings.quick else bandwidth.BYTES)

    def timed(task: str, turn: Callable[[RemoteEngine], float]) -> dict[str, list[float]]:
        say(task)
        turns = {engine.name: partial(settled, partial(turn, engine)) for engine in engines}
        if task == "decode":
            turns = {limits.STREAMING_READ: partial(settled, read.seconds), **turns}
        return timing.in_turn(turns, settings.rounds, _WARMUP)

    prefilled = timed("prefill", lambda engine: engine.prefill(prefill))
    decoded = timed("decode", lambda engine: engine.decode(prompt, fed))
    generated = timed("generate", lambda engine: engine.generate(prompt, new)) if end_to_end else {}
    rates = tuple(read.nbytes / seconds for seconds in decoded.pop(limits.STREAMING_READ))
    name = limits.STREAMING_READ
    measurements = [Measurement("bandwidth", name, name, "bytes per second", rates, {"method": read.method})]
    for engine in engines:
        figures = [("prefill", "seconds", prefilled, 1), ("decode", "seconds per token", decoded, new)]
        figures += [("generate", "seconds", generated, 1)] if generated else []
        for task, unit, seconds, divisor in figures:
            values = tuple(value / divisor for value in seconds[engine.name])
            measurements.append(Measurement(task, engine.name, engine.baseline, unit, values, _details(engine)))
    return measurements


def measure_memory(subject: Subject, names: Sequence[str], settings: Settings, ids: list[int]) -> list[Measurement]:
    """Return each engine's peak memory: it loads the model, prefills and decodes in a process of its own."""
    measurements = []
    for name in names:
        say(f"memory of {subject.name} in {name}")
        (peak,) = peak_rss_bytes(load_and_decode, [(subject, name, settings, ids)])
        measurements.append(Measurement("memory", name, name, "bytes", (peak,), {}))
    return measurements


def load_and_decode(subject: Subject, name: str, settings: Settings, ids: list[int]) -> None:
    """Load one engine, prefill, and decode a few tokens."""
    engine = roster.load(subject, name, settings.threads, settings.context)
    state = engine.start(ids[: settings.prefill_tokens])
    engine.decode(state, ids[:_DECODED_ALONE])


def _details(engine: RemoteEngine) -> dict[str, Any]:
    return {**engine.details, "weight_bytes_per_token": engine.weight_bytes}


def _with_details(memory: Measurement, engines: Sequence[RemoteEngine]) -> Measurement:
    (engine,) = (e for e in engines if e.name == memory.engine)
    details = {key: engine.details[key] for key in ("quality", "prefill_quality")}
    return Measurement(memory.task, memory.engine, engine.baseline, memory.unit, memory.values, details)


def settled(turn: Callable[[], float]) -> float:
    """Return what a turn took, once threads of the engine before it have ceased to spin."""
    time.sleep(_SETTLE_SECONDS)
    return turn()


def say(progress: str) -> None:
    """Show on stderr what is being done."""
    print(progress, file=sys.stderr, flush=True)
