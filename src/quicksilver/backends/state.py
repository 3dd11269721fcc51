"""The tokens of a pass between two layers: who runs on, who has halted, who was absorbed; and what a pass keeps.

Deciding who stops is done elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from quicksilver.cache import SequenceCache
from quicksilver.core.ragged import RaggedLayout
from quicksilver.core.trace import Trace
from quicksilver.families.rotary import Rotation


class SplitRows(NamedTuple):
    """Rows of a state that stop and rows that go on, each ascending."""

    stop: Tensor
    keep: Tensor


class Stop(NamedTuple):
    """Tokens that stopped after one layer: [M] their origins."""

    layer_idx: int
    origins: Tensor


class Protected(NamedTuple):
    """Tokens of a pass that each mechanism may not touch, [N] bool; None where there are none, or no such mechanism."""

    halting: Tensor | None = None
    bits: Tensor | None = None
    shortcuts: Tensor | None = None


@dataclass(frozen=True)
class PassContext:
    """What stays the same through one pass."""

    token_ids: Tensor  # [N] of all tokens of the pass
    rotations: tuple[Rotation, ...]  # of all tokens of the pass; each layer names its own
    protected: Protected  # which tokens each mechanism may not touch
    fuses: tuple[bool, ...]  # for each sequence, whether its tokens may fuse in this pass
    caches: Sequence[SequenceCache]  # of its sequences, extended by every layer
    trace: Trace  # counts what runs


@dataclass
class State:
    """The tokens of a pass, N in all, M of which run on. Backends and steps change it in place."""

    chunk: RaggedLayout  # layout of all of them
    hidden: Tensor  # [M, d] residual stream of those that run on
    layout: RaggedLayout  # where each row of `hidden` comes from
    rotations: tuple[Rotation, ...]  # of the rows' queries and keys; each layer names its own
    present: RaggedLayout  # layout of the tokens that are not absorbed: layers to come list them, as the fill says
    before: Tensor | None = None  # [M, d] what entered the last layer that ran
    update: Tensor | None = None  # [M, d] what the last layer added, None where no rule reads it
    halted: Tensor | None = None  # origins of halted tokens, ascending, None if none
    frozen: Tensor | None = None  # [N, d] states of those that stopped (running tokens' are unset), None if none did
    masses: Tensor | None = None  # [N] tokens that each stands for, None where each stands for one
    max_bits: Tensor | None = None  # [N] uint8, the most bits of each weight that a token reads, None for no limit
    stops: list[Stop] = field(default_factory=list)  # who stopped where, each token once

    @property
    def mass(self) -> Tensor | None:
        """[M] tokens that each row of `hidden` stands for, None where each stands for one."""
        return None if self.masses is None else self.masses.index_select(0, self.layout.origin)

    def halt(self, layer_idx: int, split: SplitRows) -> None:
        """Halt rows after a layer."""
        rows = self._freeze(layer_idx, split.stop)
        if split.keep.shape[0] == 0:
            self.halted = self.present.origin
        elif self.halted is not None:
            self.halted = torch.cat((self.halted, rows)).sort().values
        else:
            self.halted = rows
        self._keep(split.keep)

    def absorb(self, layer_idx: int, split: SplitRows, hidden: Tensor, masses: Tensor) -> None:
        """Let rows stop for good; those that go on have states `hidden` and stand for `masses` tokens."""
        rows = self._freeze(layer_idx, split.stop)
        if self.masses is None:
            self.masses = torch.ones_like(self.chunk.origin)
        self._keep(split.keep)
        self.masses.index_copy_(0, self.layout.origin, masses)
        self.hidden = hidden
        present = torch.ones_like(self.chunk.origin, dtype=torch.bool).index_fill_(0, rows, False)
        self.present = self.present.select(present.index_select(0, self.present.origin).nonzero().squeeze(-1))

    def final(self) -> Tensor:
        """Return the state of each token after the last layer that it ran, [N, d]."""
        if self.frozen is None:
            return self.hidden
        return self.frozen.index_copy_(0, self.layout.origin, self.hidden)

    def _freeze(self, layer_idx: int, rows: Tensor) -> Tensor:
        """Keep the states of rows that stop; return their origins."""
        if self.frozen is None:
            self.frozen = self.hidden.new_empty((self.chunk.num_tokens, self.hidden.shape[1]))
        origins = self.layout.origin.index_select(0, rows)
        self.frozen.index_copy_(0, origins, self.hidden.index_select(0, rows))
        self.stops.append(Stop(layer_idx, origins))
        return origins

    def _keep(self, rows: Tensor) -> None:
        """Let the given rows ([M], ascending) run on."""
        self.hidden, self.layout = self.hidden.index_select(0, rows), self.layout.select(rows)
        self.rotations = tuple(rotation.select(rows) for rotation in self.rotations)
        self.update = None if self.update is None else self.update.index_select(0, rows)


Step = Callable[[int, State, PassContext], None]
"""Decides about the tokens that run on after a layer, and applies that to their state."""
