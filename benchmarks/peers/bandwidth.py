"""How fast this machine reads memory: a buffer many times the cache, read from end to end by all threads.

PyTorch reduces the buffer to one number, its threads a part each. Which reduction stands least in the way differs
between machines, so the fastest of a few is found first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.timing import seconds

BYTES, QUICK_BYTES = 2**30, 2**26
_TRIALS = 3
_READERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum of float32": lambda buffer: buffer.view(torch.float32).sum(),
    "sum of int64": lambda buffer: buffer.view(torch.int64).sum(),
    "max of float32": lambda buffer: buffer.view(torch.float32).max(),
    "max of int32": lambda buffer: buffer.view(torch.int32).max(),
    "dot of float32 with itself": lambda buffer: torch.dot(buffer.view(torch.float32), buffer.view(torch.float32)),
}


class StreamingRead:
    """One reader of one buffer.

    Args:
        size: of the buffer, in bytes.

    Attributes:
        nbytes: of the buffer.
        method: in words.
    """

    def __init__(self, size: int) -> None:
        self.nbytes = size
        self._buffer = torch.zeros(size // 4, dtype=torch.int32)
        fastest = min(_READERS, key=lambda name: min(seconds(_READERS[name], self._buffer) for _ in range(_TRIALS)))
        self._read = _READERS[fastest]
        threads = torch.get_num_threads()
        self.method = f"{fastest} over {size / 2**20:.0f} MiB, torch, {threads} thread(s), once for every round"

    def seconds(self) -> float:
        """Return the seconds of reading the buffer once."""
        return seconds(self._read, self._buffer)
