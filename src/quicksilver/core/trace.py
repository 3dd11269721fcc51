"""The record of a run: what each layer computed, as counts and optional per-token depths.

FLOPs, tables, pictures and the oracle tests all read this; it computes no cost itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from quicksilver.core.bits import MAX_WIDTH
from quicksilver.core.ragged import RaggedLayout


class DeferredSum:
    """A running total of host integers and device scalars; the device is asked when it is read, and now and then."""

    _LIMIT = 512  # device scalars kept before they are read

    def __init__(self) -> None:
        self._host = 0
        self._device: list[Tensor] = []

    def add(self, value: int | Tensor) -> None:
        """Add a host integer, or a scalar tensor without waiting for it."""
        if isinstance(value, Tensor):
            self._device.append(value)
            if len(self._device) >= self._LIMIT:
                self._read()
        else:
            self._host += value

    @property
    def value(self) -> int:
        """The total so far, as a host integer."""
        self._read()
        return self._host

    def _read(self) -> None:
        if self._device:
            self._host += int(torch.stack(self._device).sum())
            self._device.clear()


class WidthCounts:
    """How many bits of nested weights were read, as multiply-adds by width and as bytes.

    Counts on a device are asked for when a total is read, and else only once in every `_LIMIT` applications, so that
    what is kept of a long run stays small.
    """

    _LIMIT = 512

    def __init__(self) -> None:
        self._macs = [0] * (MAX_WIDTH + 1)
        self._bytes = 0
        self._device: list[tuple[Tensor, int, Sequence[int]]] = []

    def add(self, channels: Sequence[int] | Tensor, num_outputs: int, channel_bytes: Sequence[int]) -> None:
        """Count one application of a map.

        Args:
            channels: [9] input channels, over all rows, read at 0, 1, ... 8 bits.
            num_outputs: multiply-adds of a channel.
            channel_bytes: [9] bytes of a channel read at each width.
        """
        if isinstance(channels, Tensor):
            self._device.append((channels, num_outputs, channel_bytes))
            if len(self._device) >= self._LIMIT:
                self._read()
        else:
            self._count(channels, num_outputs, channel_bytes)

    @property
    def macs(self) -> list[int]:
        """[9] multiply-adds at 0, 1, ... 8 bits; those at 0 were not done."""
        self._read()
        return list(self._macs)

    @property
    def bytes_read(self) -> int:
        """Bytes read, each row for itself."""
        self._read()
        return self._bytes

    def _read(self) -> None:
        if self._device:
            counts = torch.stack([channels for channels, *_ in self._device]).tolist()
            for channels, (_, num_outputs, channel_bytes) in zip(counts, self._device, strict=True):
                self._count(channels, num_outputs, channel_bytes)
            self._device.clear()

    def _count(self, channels: Sequence[int], num_outputs: int, channel_bytes: Sequence[int]) -> None:
        self._macs = [macs + count * num_outputs for macs, count in zip(self._macs, channels, strict=True)]
        self._bytes += sum(count * size for count, size in zip(channels, channel_bytes, strict=True))


class LayerTrace:
    """Counts of one layer, summed over the run.

    Attributes:
        query_rows: tokens that ran the layer, by shortcuts or in full.
        fill_rows: rows for which key and value alone were projected: halted tokens.
        attended: (query, key) pairs scored, a DeferredSum; a token that takes a shortcut past attention scores none.
        values_skipped: values that these pairs' heads did not read, a DeferredSum.
        scores_skipped: multiply-adds of these pairs' scores that were left out, a DeferredSum.
        scored_twice: of these pairs' scores, one for each head, those that took both steps of screening, a DeferredSum.
        entries_read: cache entries that queries read, over passes and sequences.
        halted: tokens that halted after this layer.
        fusion_rows: rows that reached fusion after this layer.
        fused: tokens that were absorbed by a later one after this layer.
        group_sizes: fused groups by the tokens that they stand for.
        signal_rows: rows for which each signal was computed after this layer; of "score", channels in it, for each
            of which one norm is read too; of "query", queries in it whose components' mean square was taken;
            of "entry", keys and values that were turned into codes.
        rule_macs: multiply-adds that rules of halting and fusion report beside their signals.
        widths: bits read of its nested weights, a WidthCounts.
        shortcut_rows: of the rows that ran the layer, those that took a shortcut past each sublayer.
        fitted_macs: multiply-adds of fitted maps and gates after the layer and in it.
        fitted_bytes: bytes of fitted maps and gates, read once by each row that they were applied to.
    """

    def __init__(self) -> None:
        self.query_rows = 0
        self.fill_rows = 0
        self.attended = DeferredSum()
        self.values_skipped = DeferredSum()
        self.scores_skipped = DeferredSum()
        self.scored_twice = DeferredSum()
        self.entries_read = 0
        self.halted = 0
        self.fusion_rows = 0
        self.fused = 0
        self.group_sizes: Counter[int] = Counter()
        self.signal_rows: Counter[str] = Counter()
        self.rule_macs = 0
        self.widths = WidthCounts()
        self.shortcut_rows: Counter[str] = Counter()
        self.fitted_macs = 0
        self.fitted_bytes = 0

    def record_fitted(self, rows: int, macs: int, nbytes: int) -> None:
        """Count a fitted map or gate of so many multiply-adds and bytes, applied to `rows` rows."""
        self.fitted_macs += rows * macs
        self.fitted_bytes += rows * nbytes


Counts = TypeVar("Counts", bound="PendingCounts")


class PendingCounts(Protocol):
    """Counts kept elsewhere, in a form that is cheap to add to."""

    def settle(self, layers: Sequence[LayerTrace]) -> None:
        """Add what has been counted; called once."""
        ...


class Trace:
    """Counts of a run: one forward pass, or all passes of one `generate`.

    Args:
        num_layers: layers of the model.
        per_token: also keep, per pass, how many layers each token ran.
        entry_bits: bits of the keys and values that are read: 8 for codes with a scale for each entry and K/V head,
            None for the model's own.
    """

    def __init__(self, num_layers: int, per_token: bool = False, entry_bits: int | None = None) -> None:
        self._num_layers = num_layers
        self._layers: dict[int, LayerTrace] = {}  # made when asked for: a pass of one token has no time
        self._pending: dict[object, PendingCounts] = {}
        self.tokens = 0
        self.head_rows = 0
        self.dense_attended = 0
        self.kv_bytes = 0
        self.kv_used_bytes = 0
        self.kv_entries = 0
        self.per_token = per_token
        self.entry_bits = entry_bits
        self.depths: list[Tensor] = []

    @property
    def layers(self) -> Sequence[LayerTrace]:
        """Counts of each layer, complete."""
        layers = [self.at(layer_idx) for layer_idx in range(self._num_layers)]
        while self._pending:
            self._pending.popitem()[1].settle(layers)
        return layers

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds: all that has been counted, and nothing of who counts."""
        layers = dict(enumerate(self.layers))
        return {**self.__dict__, "_layers": layers}

    def at(self, layer_idx: int) -> LayerTrace:
        """Return one layer's counts to add to; what kernels have counted may not be in them yet."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = LayerTrace()
        return self._layers[layer_idx]

    def pending(self, owner: object, make: Callable[[], Counts]) -> Counts:
        """Return an owner's counts, made where there are none; they are added, and let go, when layers are read."""
        if owner not in self._pending:
            self._pending[owner] = make()
        return self._pending[owner]  # type: ignore[return-value]

    def begin_pass(self, starts: list[int], layout: RaggedLayout) -> None:
        """Count the tokens entering a pass and the pairs that dense causal attention would score."""
        self.tokens += layout.num_tokens
        for start, length in zip(starts, layout.lengths, strict=True):
            self.dense_attended += length * start + length * (length + 1) // 2
        if self.per_token:
            depth = torch.full((layout.num_tokens,), self._num_layers, device=layout.origin.device)
            self.depths.append(depth)

    def record_halt(self, layer_idx: int, origin: Tensor, signal_rows: Mapping[str, int]) -> None:
        """Record the tokens ([M] origins) that halted after a layer and the signals computed there."""
        layer = self.at(layer_idx)
        layer.halted += origin.shape[0]
        layer.signal_rows.update(signal_rows)
        self._record_depth(layer_idx, origin)

    def record_fusion(self, layer_idx: int, origin: Tensor, fused: int, sizes: Mapping[int, int]) -> None:
        """Record what fusion after a layer did.

        Args:
            layer_idx: the layer.
            origin: [M] origins of this pass's tokens that were absorbed.
            fused: tokens absorbed, those of earlier passes included.
            sizes: groups by size, to be added; negative where one has grown.
        """
        layer = self.at(layer_idx)
        layer.fused += fused
        layer.group_sizes.update(sizes)
        self._record_depth(layer_idx, origin)

    def _record_depth(self, layer_idx: int, origin: Tensor) -> None:
        if self.per_token and origin.shape[0]:
            self.depths[-1].index_fill_(0, origin, layer_idx + 1)

    def record_cache(self, allocated: int, used: int, entries: int) -> None:
        """Record the cache after a pass: bytes allocated, bytes of what is held, and entries."""
        self.kv_bytes, self.kv_used_bytes, self.kv_entries = allocated, used, entries

    @property
    def group_sizes(self) -> dict[int, int]:
        """Fused groups by the tokens that they stand for, over all layers.

        Below zero where a group that another trace has counted has grown.
        """
        sizes: Counter[int] = Counter()
        for layer in self.layers:
            sizes.update(layer.group_sizes)
        return {size: count for size, count in sorted(sizes.items()) if count}

    @property
    def fused_fraction(self) -> float:
        """Share of the tokens fed that a later token absorbed."""
        return sum(layer.fused for layer in self.layers) / max(self.tokens, 1)

    @property
    def entries_read(self) -> int:
        """Cache entries that queries read, over all passes, layers and sequences."""
        return sum(layer.entries_read for layer in self.layers)

    def values_read(self, num_heads: int) -> float:
        """Share of the values of scored (query, key) pairs that their `num_heads` heads read, over all layers."""
        values = num_heads * sum(layer.attended.value for layer in self.layers)
        return 1.0 - sum(layer.values_skipped.value for layer in self.layers) / max(values, 1)

    def query_components_read(self, num_heads: int, head_dim: int) -> float:
        """Share of the multiply-adds of scores that were done, of queries of `num_heads` heads of width `head_dim`."""
        macs = num_heads * head_dim * sum(layer.attended.value for layer in self.layers)
        return 1.0 - sum(layer.scores_skipped.value for layer in self.layers) / max(macs, 1)

    @property
    def macs_by_width(self) -> list[int]:
        """[9] multiply-adds of nested weights read at 0, 1, ... 8 bits, over all layers; those at 0 were not done."""
        return [sum(counts) for counts in zip(*(layer.widths.macs for layer in self.layers), strict=True)]

    @property
    def mean_depth(self) -> float:
        """Layers run per token, on average."""
        return sum(layer.query_rows for layer in self.layers) / max(self.tokens, 1)
