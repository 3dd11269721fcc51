"""A function's calls, each in a process of its own, and their peak memory.

What the function does is the caller's.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kibibytes elsewhere


def peak_rss_bytes(function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> list[int]:
    """Call a function with each tuple of arguments, each time in a fresh process; the processes run side by side.

    Use this while the calling process is still small: Linux carries the caller's peak into the child's
    figure when the child starts its own program.

    Returns:
        Peak resident bytes of each call's process, in order.

    Raises:
        RuntimeError: a figure may be the caller's peak, not the child's.
        BrokenProcessPool: a child was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(max_workers=1, mp_context=spawn)) for _ in calls]
        running = [pool.submit(_run, function, call) for pool, call in zip(pools, calls, strict=True)]
        peaks = [done.result() for done in running]
    if min(peaks) <= _own_peak():
        raise RuntimeError("this process has used more memory than one it measured; measure memory first")
    return peaks


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process and return what it returns; all memory that it took is given back."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _run(function: Callable[..., None], arguments: tuple[Any, ...]) -> int:
    function(*arguments)
    return _own_peak()


def _own_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
