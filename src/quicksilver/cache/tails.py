"""The open end of each sequence at each fusion layer: what a later pass needs to go on with its last group.

A tail says what was decided; deciding, and what a changed mind costs, is the runtime's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from quicksilver.core.groups import FusionRows


@dataclass(frozen=True)
class TailRow:
    """One of the last rows that reached a fusion layer.

    Attributes:
        row: one row that stands for its group up to itself.
        position: its logical position, on the host.
        joined: it joined the group of the row before.
        ran: deeper layers hold its entries (until it is absorbed, or the row that absorbed it is taken back).
    """

    row: FusionRows
    position: int
    joined: bool
    ran: bool = True


class TakenBack(NamedTuple):
    """A row that a fusion layer no longer counts, and the row it had absorbed, if any, which counts again."""

    layer_idx: int
    taken: TailRow
    uncovered: TailRow | None


class FusionTails:
    """A short stack of rows for each sequence at each fusion layer.

    A fusion layer below others can take back what they decided about the last row, and they in turn about the
    row before: the stack at the n-th fusion layer is n rows deep.

    Args:
        layers: indices of the layers after which tokens fuse, ascending.
        batch_size: number of sequences.
    """

    def __init__(self, layers: tuple[int, ...], batch_size: int) -> None:
        self.layers = layers
        self._stacks: dict[int, list[tuple[TailRow, ...]]] = {layer: [()] * batch_size for layer in layers}

    def stack(self, layer_idx: int, seq: int) -> tuple[TailRow, ...]:
        """Return the sequence's last rows at a fusion layer, oldest first."""
        return self._stacks[layer_idx][seq]

    def last(self, layer_idx: int, seq: int) -> TailRow | None:
        """Return the sequence's last row at a fusion layer, if any."""
        stack = self._stacks[layer_idx][seq]
        return stack[-1] if stack else None

    def forget(self, seq: int) -> None:
        """Drop a sequence's rows: a pass in which it did not fuse has gone by, and nothing is adjacent any more."""
        for stacks in self._stacks.values():
            stacks[seq] = ()

    def has(self, seq: int) -> bool:
        """Whether a sequence has rows that what comes next may join."""
        return any(stacks[seq] for stacks in self._stacks.values())

    def take(self, seqs: Sequence[int]) -> None:
        """Let the sequences be those of these indices from now on."""
        self._stacks = {layer_idx: [stacks[seq] for seq in seqs] for layer_idx, stacks in self._stacks.items()}

    def depth(self, layer_idx: int) -> int:
        """Return how many rows a fusion layer's stacks hold at most."""
        return self.layers.index(layer_idx) + 1

    def push(self, layer_idx: int, seq: int, rows: list[TailRow]) -> None:
        """Add rows, oldest first."""
        self._stacks[layer_idx][seq] = (*self._stacks[layer_idx][seq], *rows)[-self.depth(layer_idx) :]

    def mark_run(self, layer_idx: int, seq: int) -> None:
        """Note that the last row's entries are in the deeper layers again."""
        *rest, last = self._stacks[layer_idx][seq]
        self._stacks[layer_idx][seq] = (*rest, replace(last, ran=True))

    def take_back(self, after_layer: int, seq: int, position: int) -> list[TakenBack]:
        """Forget the row at `position` at every deeper fusion layer, if it is the last there; return what changed."""
        changes = []
        for layer_idx in self.layers:
            stack = self._stacks[layer_idx][seq]
            if layer_idx <= after_layer or not stack or stack[-1].position != position:
                continue
            *rest, taken = stack
            if taken.joined and rest:  # whom it had absorbed must go on alone after all, or join another
                rest[-1] = replace(rest[-1], ran=False)
            self._stacks[layer_idx][seq] = tuple(rest)
            changes.append(TakenBack(layer_idx, taken, rest[-1] if taken.joined and rest else None))
        return changes

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        rows = (tail.row for stacks in self._stacks.values() for stack in stacks for tail in stack)
        tensors = (getattr(row, field.name) for row in rows for field in fields(row))
        return sum(value.numel() * value.element_size() for value in tensors if value is not None)
