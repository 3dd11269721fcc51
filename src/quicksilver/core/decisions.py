"""What rules see (`LayerView`, `PairView`, ...) and what they return (`HaltDecision`, ...): data, never actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerView:
    """One layer's running tokens, as a rule sees them after the layer.

    Attributes:
        layer_idx: index of the layer that just ran.
        before: [N, d] states that entered the layer.
        after: [N, d] states that left it.
        previous_update: [N, d] what the layer before added; None after the first layer, and where the rule does not say
            that it reads it.
        positions: [N] logical positions.
        token_ids: [N] the tokens themselves.
        head_entropy: maps states [M, d] to the entropy of the model's head on them, [M], in bits.
        gate: [d + 4] float32, the fitted gate of the layer, None where it has none.
    """

    layer_idx: int
    before: Tensor
    after: Tensor
    previous_update: Tensor | None
    positions: Tensor
    token_ids: Tensor
    head_entropy: Callable[[Tensor], Tensor]
    gate: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.after.shape[0]

    def select(self, rows: Tensor) -> LayerView:
        """Return the view of the given rows ([M])."""
        names = ("before", "after", "previous_update", "positions", "token_ids")
        parts = {name: part.index_select(0, rows) for name in names if (part := getattr(self, name)) is not None}
        return replace(self, **parts)


HALT_SIGNALS = ("norm", "cosine", "softmax", "head")
"""Signals of a state that a halting rule can say it computed: a norm of it, its cosine with another vector, a softmax
over it, and the model's head on it with the entropy of what that predicts."""


@dataclass(frozen=True)
class HaltDecision:
    """Which tokens halt now, and what finding out cost.

    Attributes:
        halt: [N] bool.
        signal_rows: rows for which each of `HALT_SIGNALS` was computed; what a row costs is counted by the signal.
        gate_rows: rows that were multiplied by the layer's fitted gate.
        macs: multiply-adds of all that no signal stands for, over all rows.
    """

    halt: Tensor
    signal_rows: Mapping[str, int] = field(default_factory=dict)
    gate_rows: int = field(default=0, kw_only=True)
    macs: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class PairView:
    """Pairs of adjacent tokens that may fuse after a layer, as a rule sees them.

    Attributes:
        layer_idx: index of the layer that just ran.
        ordinal: which of the plan's fusion layers this is, from 0.
        earlier: [P, d] states of the earlier tokens.
        later: [P, d] states of the later tokens.
        positions: [P] logical positions of the later tokens.
        token_ids: [P] the later tokens themselves.
    """

    layer_idx: int
    ordinal: int
    earlier: Tensor
    later: Tensor
    positions: Tensor
    token_ids: Tensor

    @property
    def num_pairs(self) -> int:
        return self.later.shape[0]


PAIR_SIGNALS = ("norm", "cosine")
"""Signals of a pair of states that a fusion rule can say it computed: a norm of their difference, their cosine."""


@dataclass(frozen=True)
class FusionDecision:
    """Which pairs are alike, and what finding out cost.

    Attributes:
        alike: [P] bool.
        signal_rows: pairs for which each of `PAIR_SIGNALS` was computed; what a pair costs is counted by the signal.
        macs: multiply-adds of all that no signal stands for, over all pairs.
    """

    alike: Tensor
    signal_rows: Mapping[str, int] = field(default_factory=dict)
    macs: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class TokenBitsView:
    """Tokens that are granted bits at once, as a rule sees them after a layer.

    Attributes:
        hidden: [N, d] their states.
        head_entropy: maps states [M, d] to the entropy of the model's head on them, [M], in bits.
    """

    hidden: Tensor
    head_entropy: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ChannelView:
    """The inputs of one linear map, as a rule that chooses bits sees them.

    Attributes:
        layer_idx: index of the layer.
        map_idx: which of the layer's quantized maps this is.
        num_maps: how many it has.
        inputs: [N, in] what the map is applied to.
        norms: gives [in] float32, the norm of each input channel's weights.
        max_bits: [N] uint8, the most bits each token may read; None for no limit.
    """

    layer_idx: int
    map_idx: int
    num_maps: int
    inputs: Tensor
    norms: Callable[[], Tensor]
    max_bits: Tensor | None


BITS_SIGNALS = ("head", "softmax", "score")
"""Signals that a precision rule can say it computed: of a state the head's entropy or that of a softmax over it, of a
channel its score."""


@dataclass(frozen=True)
class BitsChoice:
    """How many bits are read, and what finding out cost.

    Attributes:
        bits: one number for everything, [N] uint8 for each token, or [N, in] uint8 for each of its channels.
        signal_rows: rows (of "score": channels) for which each of `BITS_SIGNALS` was computed.
        macs: multiply-adds of all that no signal stands for.
    """

    bits: int | Tensor
    signal_rows: Mapping[str, int] = field(default_factory=dict)
    macs: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class KernelBits:
    """What compiled kernels do for one map in place of a rule: they read bits by channel, or the same of all."""

    # that channels are read at, descending; without thresholds one number, for all channels of every token that is
    # granted as many
    bits: tuple[int, ...]
    # descending, one fewer: the first bits are read where `|x_j| * ||W[j]||` is at least the first
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class ShortcutView:
    """What enters one sublayer, as the rule that lets tokens skip it sees it."""

    normed: Tensor  # [N, d] the sublayer's normed input
    state: Tensor  # [N, d] the states that it was normed from
    protected: Tensor | None  # [N] tokens that must run the sublayer, None where none must


@dataclass(frozen=True)
class ShortcutDecision:
    """Which tokens take a shortcut past a sublayer, and for how many the gate was asked."""

    take: Tensor  # [N] bool
    gate_rows: int  # rows that the gate was applied to


class Fill(Enum):
    """How a halted token's entry in a layer that it does not run comes about."""

    NONE = auto()
    ZERO = auto()
    PROJECT = auto()
