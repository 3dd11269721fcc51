"""KV: what stands in deeper layers' caches for a halted token, as frozen configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVFill:
    """Base of the choices for a halted token's keys and values in the layers it skips."""


@dataclass(frozen=True)
class DropFill(KVFill):
    """Nothing is written: later tokens attend over fewer entries (the paper)."""


@dataclass(frozen=True)
class ZeroFill(KVFill):
    """A zero key and value are written: the paper's formula read literally; they still take softmax mass."""


@dataclass(frozen=True)
class PropagateFill(KVFill):
    """The layer's own key and value projections of the frozen state are written."""
