"""Engines in processes of their own, from the side of the process that measures.

What goes on at the other end of the pipe is `serving.py`'s, which engines share a process `roster.py`'s.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import numpy as np

from benchmarks.gate import GateError
from benchmarks.peers.engines import Engine
from benchmarks.peers.serving import Call, Facts, Failure, Reply, serve
from quicksilver.errors import QuickSilverError

_ENDING_SECONDS = 5.0  # a process is given to end by itself, then to be terminated
_OURS_TO_EXPLAIN = (GateError, QuickSilverError, ValueError)


class WorkerError(Exception):
    """A process of engines failed or died; the message says whose and how."""


class RemoteEngine:
    """An engine in another process: asked for what an `Engine` is, and telling what it took.

    Seconds are taken in the other process, around the work alone. One engine works at a time: a call returns when its
    work is done.

    Attributes:
        name, baseline, details, weight_bytes: as an `Engine`'s, as of the last call; `baseline` may be set here.
    """

    def __init__(self, worker: _Worker, facts: Facts) -> None:
        self._worker = worker
        self.name, self.baseline, self.details, self.weight_bytes = facts

    def tune(self, ids: Sequence[int], prompt: int, prefill: int) -> None:
        """Have it do what it must before it is measured."""
        self._call("tune", ids, prompt, prefill)

    def logits(self, ids: Sequence[int], singly: int) -> np.ndarray:
        """Return every token's logits, [T, vocab] float32."""
        return self._call("logits", ids, singly).value

    def prefill(self, ids: Sequence[int]) -> float:
        """Return the seconds of a prompt fed at once."""
        return self._call("prefill", ids).seconds

    def prefilled(self) -> np.ndarray:
        """Return the logits of the prompt that was fed last so, [1, vocab] float32."""
        return self._call("prefilled").value

    def decode(self, prompt: Sequence[int], ids: Sequence[int]) -> float:
        """Return the seconds of as many tokens as there are ids, after a prompt, whose own are not among them."""
        return self._call("decode", ids, prompt=prompt).seconds

    def generate(self, prompt: Sequence[int], count: int) -> float:
        """Return the seconds of `count` new tokens after a prompt, its own among them."""
        return self._call("generate", prompt, count).seconds

    def _call(self, method: str, *arguments: Any, prompt: Sequence[int] | None = None) -> Reply:
        reply = self._worker.ask(Call(self.name, method, arguments, prompt))
        self.details |= reply.facts.details
        self.weight_bytes = reply.facts.weight_bytes
        return reply


@contextmanager
def worker(name: str, load: Callable[[], Sequence[Engine]]) -> Iterator[list[RemoteEngine]]:
    """Have engines loaded in a process of their own, which ends with the block.

    Args:
        name: of the process, in messages.
        load: called there; must be picklable.

    Raises:
        WorkerError: the process failed or died, when loading or at any call.
        GateError, QuickSilverError, ValueError: as raised there.
    """
    process = _Worker(name, load)
    try:
        yield [RemoteEngine(process, facts) for facts in process.receive()]
    finally:
        process.close()


@contextmanager
def explained() -> Iterator[None]:
    """Have what a user can mend, or must know, end a command in one line."""
    try:
        yield
    except GateError as error:
        raise click.ClickException(f"correctness gate failed, nothing was timed: {error}") from None
    except WorkerError as error:
        raise click.ClickException(str(error)) from None
    except (QuickSilverError, ValueError) as error:
        raise click.UsageError(str(error)) from None


class _Worker:
    """A process and the pipe to it; it also ends where this process is gone and with it this end of the pipe."""

    def __init__(self, name: str, load: Callable[[], Sequence[Engine]]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, load), name=name, daemon=True)
        self._process.start()
        theirs.close()  # theirs is the only one, so that their death is the end of what can be read

    def ask(self, call: Call) -> Reply:
        """Send a call and wait for its reply."""
        try:
            self._connection.send(call)
        except OSError:
            raise self._death() from None
        return self.receive()

    def receive(self) -> Any:
        """Return what is sent next; raise what it was sent instead."""
        try:
            received = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if not isinstance(received, Failure):
            return received
        cause = WorkerError(f"in the process of {self._process.name}:\n{received.trace}")
        if isinstance(received.error, _OURS_TO_EXPLAIN):
            raise received.error from cause
        text = f"{type(received.error).__name__}: {received.error}"
        raise WorkerError(f"the process of {self._process.name} failed: {text}") from cause

    def close(self) -> None:
        """End the process, by force where it does not end by itself."""
        self._connection.close()
        for force in (self._process.terminate, self._process.kill):
            self._process.join(_ENDING_SECONDS)
            if self._process.is_alive():
                force()
        self._process.join()
        self._process.close()

    def _death(self) -> WorkerError:
        self._process.join(_ENDING_SECONDS)
        code = self._process.exitcode
        how = f"exit status {code}" if code is None or code >= 0 else signal.Signals(-code).name
        return WorkerError(f"the process of {self._process.name} died ({how})")
