"""How the tokens of a pass stand between two layers: running, halted, or absorbed by a later token.

Deciding who stops is done elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from quicksilver.core.ragged import RaggedLayout, TokenState
from quicksilver.families.rotary import Rotation


class SplitRows(NamedTuple):
    """Rows of a state that stop and rows that go on, each ascending."""

    stop: Tensor
    keep: Tensor


class Stop(NamedTuple):
    """Tokens that stopped after one layer: [M] their origins."""

    layer_idx: int
    origins: Tensor


@dataclass(frozen=True)
class Running:
    """The tokens that run the next layer, and what goes with them.

    Attributes:
        state: their states.
        rotation: of their queries and keys, None where positions are embedded.
        update: [N, d] what the last layer added, None where no rule reads it.
    """

    state: TokenState
    rotation: Rotation | None
    update: Tensor | None = None

    def __len__(self) -> int:
        return self.state.hidden.shape[0]

    def select(self, rows: Tensor, state: TokenState | None = None) -> Running:
        """Return the given rows ([M], ascending), in another state if one is given."""
        rotation = None if self.rotation is None else self.rotation.select(rows)
        update = None if self.update is None else self.update.index_select(0, rows)
        return Running(self.state.select(rows) if state is None else state, rotation, update)


@dataclass(frozen=True)
class TokenStatus:
    """The tokens of a pass, N in all; the tensors over them are in order of origin.

    Attributes:
        chunk: layout of all of them.
        present: layout of those that are not absorbed: layers to come list them, as the fill says.
        halted: [M] origins of halted tokens, ascending, None if none.
        frozen: [N, d] states of those that stopped (rows of running tokens are unset), None if none did.
        masses: [N] tokens that each stands for, None where each stands for one.
        caps: [N] uint8, the most bits of each weight that a token reads, None where nothing limits them.
        stops: who stopped where, each token once.
    """

    chunk: RaggedLayout
    present: RaggedLayout
    halted: Tensor | None = None
    frozen: Tensor | None = None
    masses: Tensor | None = None
    caps: Tensor | None = None
    stops: tuple[Stop, ...] = ()

    @classmethod
    def all_running(cls, chunk: RaggedLayout) -> TokenStatus:
        """Return the status at the beginning of a pass."""
        return cls(chunk, chunk)

    @property
    def present_masses(self) -> Tensor | None:
        """Tokens that each present token stands for, None where each stands for one."""
        return None if self.masses is None else self.masses.index_select(0, self.present.origin)

    def halt(self, layer_idx: int, state: TokenState, split: SplitRows) -> TokenStatus:
        """Halt rows of `state`, after a layer. Grids are written in place: the value called is used up."""
        status, rows = self._freeze(layer_idx, state, split.stop)
        if split.keep.shape[0] == 0:
            return replace(status, halted=self.present.origin)
        if self.halted is not None:
            rows = torch.cat((self.halted, rows)).sort().values
        return replace(status, halted=rows)

    def absorb(self, layer_idx: int, state: TokenState, split: SplitRows, masses: Tensor) -> TokenStatus:
        """Let rows of `state` stop for good; those that go on stand for `masses` tokens. Used up as in `halt`."""
        status, rows = self._freeze(layer_idx, state, split.stop)
        grid = torch.ones_like(self.chunk.origin) if self.masses is None else self.masses
        grid.index_copy_(0, state.layout.origin.index_select(0, split.keep), masses)
        present = torch.ones_like(self.chunk.origin, dtype=torch.bool).index_fill_(0, rows, False)
        remaining = present.index_select(0, self.present.origin).nonzero().squeeze(-1)
        return replace(status, present=self.present.select(remaining), masses=grid)

    def _freeze(self, layer_idx: int, state: TokenState, rows: Tensor) -> tuple[TokenStatus, Tensor]:
        """Keep the states of rows of `state`; return the new status and the rows' origins."""
        frozen = self.frozen
        if frozen is None:
            frozen = state.hidden.new_empty((self.chunk.num_tokens, state.hidden.shape[1]))
        origins = state.layout.origin.index_select(0, rows)
        frozen.index_copy_(0, origins, state.hidden.index_select(0, rows))
        stops = (*self.stops, Stop(layer_idx, origins))
        return replace(self, frozen=frozen, stops=stops), origins
