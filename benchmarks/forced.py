"""What a plan forces on tokens by their positions, and the counts that a run must come to, by arithmetic alone.

Holding an engine's own counts against these is `gate.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Forced:
    """What a plan forces on one sequence.

    Attributes:
        num_layers: layers of the model.
        depths: layers that tokens at positions 0, 1, ... run, repeated.
        fused_after: layers after which a prompt's tokens fuse in pairs, the first of each absorbed by the second; a
            last token without a partner goes on alone. None: no fusion.
        fills: halted tokens get entries in the layers that they do not run.
    """

    num_layers: int
    depths: tuple[int, ...]
    fused_after: int | None = None
    fills: bool = False

    def is_absorbed(self, position: int, prompt: int) -> bool:
        """Whether the token at a position is absorbed, after a prompt of so many tokens."""
        return self.fused_after is not None and position % 2 == 0 and position + 1 < prompt

    def depth(self, position: int, prompt: int) -> int:
        """Return the layers that the token at a position runs, after a prompt of so many tokens."""
        if self.fused_after is not None and self.is_absorbed(position, prompt):
            return self.fused_after
        return self.depths[position % len(self.depths)]


@dataclass(frozen=True)
class Counts:
    """What a run must come to.

    Attributes:
        tokens: tokens fed.
        layers_run: layers that the tokens run, summed.
        fused_by_layer: tokens absorbed after each layer.
        entries_read: cache entries that attention reads, over passes and layers; a pass reads a layer's once.
    """

    tokens: int
    layers_run: int
    fused_by_layer: tuple[int, ...]
    entries_read: int


def count(forced: Forced, prompt: int, passes: Sequence[range]) -> Counts:
    """Return what passes over one sequence must come to.

    Args:
        forced: the plan's.
        prompt: tokens of the prompt, at positions from 0 on; fed in one pass, here or before.
        passes: positions of the tokens of each pass, ascending.
    """
    depths = [forced.depth(position, prompt) for position in range(passes[-1].stop)]
    fed = [position for tokens in passes for position in tokens]
    fused_by_layer = [0] * forced.num_layers
    if forced.fused_after is not None:
        fused_by_layer[forced.fused_after - 1] = sum(forced.is_absorbed(position, prompt) for position in fed)
    return Counts(
        tokens=len(fed),
        layers_run=sum(depths[position] for position in fed),
        fused_by_layer=tuple(fused_by_layer),
        entries_read=sum(_entries_read(forced, depths, tokens) for tokens in passes),
    )


def _entries_read(forced: Forced, depths: Sequence[int], tokens: range) -> int:
    """Return the entries that one pass reads: those in the layers that any of its tokens runs."""
    layers = range(max(depths[tokens.start : tokens.stop]))
    if forced.fills:
        return tokens.stop * len(layers)
    return sum(depth > layer_idx for layer_idx in layers for depth in depths[: tokens.stop])
