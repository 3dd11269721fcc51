"""Engines of the comparison in processes of their own: what comes back, what goes wrong, and that they end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import timing
from benchmarks.gate import GateError
from benchmarks.peers.remote import RemoteEngine, WorkerError, worker
from quicksilver.errors import ModelError

_WORK_SECONDS, _START_SECONDS = 0.02, 0.5


class Toy:
    """An engine that says where it runs, takes a known time, and fails as it is asked to."""

    def __init__(self, name: str, log: Path | None = None) -> None:
        self.name, self.baseline, self.weight_bytes = name, "toy", 1.0
        self.details: dict[str, Any] = {"pid": os.getpid()}
        self._log = log

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
        time.sleep(_START_SECONDS)
        return lambda: len(prompt)  # cannot be sent, and need not be

    def decode(self, state: Any, ids: Sequence[int]) -> None:
        assert state() == 3
        time.sleep(_WORK_SECONDS * len(ids))

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        errors = {0: GateError("7 layers ran"), 1: ModelError("no such head"), 2: OSError("it is stuck")}
        if count in errors:
            raise errors[count]
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def toys(*names: str, log: Path | None = None) -> list[Toy]:
    return [Toy(name, log) for name in names]


def broken() -> list[Toy]:
    raise GateError("not what it should be")


def gone(engine: RemoteEngine) -> bool:
    try:
        os.kill(engine.details["pid"], 0)
    except ProcessLookupError:
        return True
    return False


def test_what_an_engine_is_and_returns_comes_back_from_its_process() -> None:
    with worker("toys", partial(toys, "a", "b")) as (first, second):
        assert first.details["pid"] == second.details["pid"] != os.getpid()
        assert (first.name, first.baseline, first.weight_bytes) == ("a", "toy", 1.0)
        first.details["quality"] = "kept"
        first.tune([1, 2], 4, 8)
        assert (first.weight_bytes, first.details["tuned"], first.details["quality"]) == (4.0, 8, "kept")
        assert (second.weight_bytes, "tuned" in second.details) == (1.0, False)
        assert first.logits([1, 2], 0).tolist() == [[1.0, 2.0]]
        assert first.prefilled().tolist() == [[first.details["pid"]]]
        # The state stays where it is; neither `start` nor the pipe is in the seconds.
        assert 2 * _WORK_SECONDS <= first.decode([1, 2, 3], [1, 2]) < _START_SECONDS
    assert gone(first)


def test_processes_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with worker("one", partial(toys, "a", "b", log=log)) as one, worker("other", partial(toys, "c", log=log)) as other:
        turns = {engine.name: partial(engine.prefill, [1]) for engine in (*one, *other)}
        seconds = timing.in_turn(turns, repeats=2, warmup=1)
    assert log.read_text(encoding="utf-8").split() == ["a", "b", "c"] * 3
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_errors_come_back_as_themselves_or_by_name_and_a_death_is_reported() -> None:
    with worker("toys", partial(toys, "a")) as (engine,):
        with pytest.raises(GateError, match=r"^7 layers ran$"):
            engine.generate([], 0)
        with pytest.raises(ModelError, match=r"^no such head$"):
            engine.generate([], 1)
        with pytest.raises(WorkerError, match=r"^the process of toys failed: OSError: it is stuck$"):
            engine.generate([], 2)
        assert engine.prefill([1]) < 1.0  # it goes on
        for _ in range(2):
            with pytest.raises(WorkerError, match=r"^the process of toys died \(SIGKILL\)$"):
                engine.generate([], 3)


def test_an_error_of_loading_comes_back_too() -> None:
    with pytest.raises(GateError, match="not what it should be"), worker("broken", broken):
        pytest.fail("nothing was loaded")


def test_a_process_ends_with_the_block_whatever_ended_it() -> None:
    with pytest.raises(KeyboardInterrupt), worker("toys", partial(toys, "a")) as (engine,):
        raise KeyboardInterrupt
    assert gone(engine)
