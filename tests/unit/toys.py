"""Engines for tests of processes with engines of their own; imports next to nothing, since each such process does."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import serving
from quicksilver.errors import ModelError

WORK_SECONDS, START_SECONDS = 0.02, 0.5


class Clock:
    """In place of the module `time` where a worker takes seconds: it goes on when a toy says that it worked."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


_CLOCK = Clock()


class Toy:
    """An engine in a process of its own that says where it runs, works a known time, and fails as it is asked to."""

    def __init__(self, name: str, log: Path | None = None) -> None:
        self.name, self.baseline, self.weight_bytes = name, "toy", 1.0
        self.details: dict[str, Any] = {"pid": os.getpid()}
        self._log = log
        serving.time = _CLOCK  # type: ignore[assignment]

    def tune(self, ids: Sequence[int], prompt: int, prefill: int) -> None:
        self.weight_bytes = float(prompt)
        self.details["tuned"] = prefill

    def logits(self, ids: Sequence[int], singly: int) -> np.ndarray:
        return np.array([ids], dtype=np.float32)

    def prefill(self, ids: Sequence[int]) -> None:
        if self._log is not None:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(f"{self.name} ")

    def prefilled(self) -> np.ndarray:
        return np.array([[float(os.getpid())]])

    def start(self, prompt: Sequence[int]) -> Any:
        _CLOCK.now += START_SECONDS
        return lambda: len(prompt)  # cannot be sent, and need not be

    def decode(self, state: Any, ids: Sequence[int]) -> None:
        assert state() == 3
        _CLOCK.now += WORK_SECONDS * len(ids)

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        from benchmarks.gate import GateError  # which imports much

        errors = {0: GateError("7 layers ran"), 1: ModelError("no such head"), 2: OSError("it is stuck")}
        if count in errors:
            raise errors[count]
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def toys(*names: str, log: Path | None = None) -> list[Toy]:
    return [Toy(name, log) for name in names]


def broken() -> list[Toy]:
    raise ModelError("not what it should be")
