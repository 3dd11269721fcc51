"""What stays the same through one pass over the layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quicksilver.cache import RaggedKVCache
from quicksilver.core.ragged import RaggedLayout
from quicksilver.core.trace import Trace
from quicksilver.families.rotary import Rotation
from quicksilver.ops import AttentionBackend, Screen
from quicksilver.rules import KVConfig, threshold_at
from quicksilver.runtime.precision import PrecisionStep
from quicksilver.runtime.shortcuts import ShortcutStep


@dataclass(frozen=True)
class PassContext:
    """What stays the same through one pass.

    Attributes:
        chunk: layout of all tokens of the pass.
        token_ids: [N] of all tokens of the pass.
        protected: [N] tokens that may never halt, None where nothing can halt.
        rotation: of all tokens of the pass, None where positions are embedded.
        fuses: for each sequence, whether its tokens may fuse in this pass.
        precision: applies linear maps, at the widths it chooses.
        exempt: [N] tokens that read all bits of every weight, None where widths are not chosen by token.
        shortcuts: lets tokens past sublayers.
        unshortened: [N] tokens that run every sublayer in full, None where none must.
        cache: extended by every layer.
        trace: counts what runs.
        backend: attention implementation.
        kv: what attention reads of the cache.
    """

    chunk: RaggedLayout
    token_ids: Tensor
    protected: Tensor | None
    rotation: Rotation | None
    fuses: tuple[bool, ...]
    precision: PrecisionStep
    exempt: Tensor | None
    shortcuts: ShortcutStep
    unshortened: Tensor | None
    cache: RaggedKVCache
    trace: Trace
    backend: AttentionBackend
    kv: KVConfig

    def screen(self, layer_idx: int) -> Screen | None:
        """Return how keys are screened in a layer, None where they are not."""
        below = threshold_at(self.kv.screen_keys_below, layer_idx)
        return Screen(below, threshold_at(self.kv.screen_query_dims_below, layer_idx)) if below else None
