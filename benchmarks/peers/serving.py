"""What a process with engines of its own does: it loads them, then answers one call after the other.

It imports nothing that computes, so that such a process holds what its engines bring and no more. The other end of the
pipe is `remote.py`'s.
"""

from __future__ import annotations

import pickle
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from benchmarks.peers.engines import Engine


class Call(NamedTuple):
    """A method of an engine to call.

    Attributes:
        engine: by name.
        method: its name.
        arguments: positional.
        prompt: fed by `start` beforehand, not timed, where there is one; the method's first argument is then what
            `start` returned.
    """

    engine: str
    method: str
    arguments: tuple[Any, ...]
    prompt: Sequence[int] | None = None


class Facts(NamedTuple):
    """An engine's attributes, as they are now."""

    name: str
    baseline: str
    details: dict[str, Any]
    weight_bytes: float

    @classmethod
    def of(cls, engine: Engine) -> Facts:
        """Return an engine's."""
        return cls(engine.name, engine.baseline, engine.details, engine.weight_bytes)


class Reply(NamedTuple):
    """What a call returned, the seconds that the method alone took, and the engine afterwards."""

    value: Any
    seconds: float
    facts: Facts


class Failure(NamedTuple):
    """What was raised instead, and its traceback as text."""

    error: Exception
    trace: str


def serve(connection: Connection, load: Callable[[], Sequence[Engine]]) -> None:
    """Load engines, send their facts, and answer calls until the other end is closed or gone.

    Args:
        connection: to the parent.
        load: returns the engines.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, interrupted, closes its end
    engines: dict[str, Engine] = {}

    def loaded() -> list[Facts]:
        engines.update((engine.name, engine) for engine in load())
        return [Facts.of(engine) for engine in engines.values()]

    with suppress(EOFError, OSError), connection:
        connection.send(_attempt(loaded))
        while True:
            call = connection.recv()
            connection.send(_attempt(partial(_answer, engines[call.engine], call)))


def _answer(engine: Engine, call: Call) -> Reply:
    state = () if call.prompt is None else (engine.start(call.prompt),)
    method = getattr(engine, call.method)
    begin = time.perf_counter()
    value = method(*state, *call.arguments)
    seconds = time.perf_counter() - begin
    return Reply(value, seconds, Facts.of(engine))


def _attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return Failure(_portable(error), traceback.format_exc())


def _portable(error: Exception) -> Exception:
    """Return an error as it is if it can be sent, else its name and text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
