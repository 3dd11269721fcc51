"""Engines of the comparison in processes of their own: what comes back, what goes wrong, and that they end."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from benchmarks import timing
from benchmarks.gate import GateError
from benchmarks.peers.remote import RemoteEngine, WorkerError, worker
from quicksilver.errors import ModelError
from tests.unit.toys import WORK_SECONDS, broken, toys


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
        assert first.decode([1, 2, 3], [1, 2]) == pytest.approx(2 * WORK_SECONDS)
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
        assert engine.prefill([1]) == 0.0  # it goes on
        for _ in range(2):
            with pytest.raises(WorkerError, match=r"^the process of toys died \(SIGKILL\)$"):
                engine.generate([], 3)


def test_an_error_of_loading_comes_back_too() -> None:
    with pytest.raises(ModelError, match="not what it should be"), worker("broken", broken):
        pytest.fail("nothing was loaded")


def test_a_process_ends_with_the_block_whatever_ended_it() -> None:
    with pytest.raises(KeyboardInterrupt), worker("toys", partial(toys, "a")) as (engine,):
        raise KeyboardInterrupt
    assert gone(engine)
