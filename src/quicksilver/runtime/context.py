"""What stays the same through one pass over the layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quicksilver.cache import RaggedKVCache
from quicksilver.core.ragged import RaggedLayout
from quicksilver.core.trace import Trace
from quicksilver.models.rotary import Rotation
from quicksilver.ops import AttentionBackend


@dataclass(frozen=True)
class PassContext:
    """What stays the same through one pass.

    Attributes:
        chunk: layout of all tokens of the pass.
        token_ids: [N] of all tokens of the pass.
        protected: [N] tokens that may never halt, None where nothing can halt.
        rotation: of all tokens of the pass, None where positions are embedded.
        fuses: for each sequence, whether its tokens may fuse in this pass.
        cache: extended by every layer.
        trace: counts what runs.
        backend: attention implementation.
    """

    chunk: RaggedLayout
    token_ids: Tensor
    protected: Tensor | None
    rotation: Rotation | None
    fuses: tuple[bool, ...]
    cache: RaggedKVCache
    trace: Trace
    backend: AttentionBackend
