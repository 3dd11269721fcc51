"""What stays the same through one pass over the layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quicksilver.cache import SequenceCache
from quicksilver.core.ragged import RaggedLayout
from quicksilver.core.trace import Trace
from quicksilver.families.rotary import Rotation
from quicksilver.ops import AttentionBackend, Screen
from quicksilver.rules import AttentionConfig, ScreeningConfig
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
        caches: of the sequences, extended by every layer.
        trace: counts what runs.
        backend: attention implementation.
        attention: what attention does not read, None where it reads all.
        screening: which keys meet a query with its large components alone, None where none do.
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
    caches: tuple[SequenceCache, ...]
    trace: Trace
    backend: AttentionBackend
    attention: AttentionConfig | None
    screening: ScreeningConfig | None

    def screen(self, layer_idx: int) -> Screen | None:
        """Return how keys are screened in a layer, None where they are not."""
        config = self.screening
        if config is None or config.threshold_in(layer_idx) == 0.0:
            return None
        return Screen(config.threshold_in(layer_idx), config.query_threshold_in(layer_idx))
