"""The record of a run: one tensor of named counts by layer, filled by whoever computes, and optional per-token depths.

FLOPs, tables, pictures and the oracle tests all read this; it computes no cost itself.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quicksilver.core.bits import MAX_BITS
from quicksilver.core.ragged import RaggedLayout

SIGNALS = ("norm", "cosine", "softmax", "head", "mean", "entry", "score", "query")
_NAMES = (
    "query_rows",  # tokens that ran the layer, by shortcuts or in full
    "fill_rows",  # rows for which key and value alone were projected: halted tokens
    "entries_read",  # cache entries that queries read, over passes and sequences
    "attended",  # (query, key) pairs scored; a token that takes a shortcut past attention scores none
    "values_skipped",  # values that these pairs' heads did not read
    "scores_skipped",  # multiply-adds of these pairs' scores that were left out
    "scored_twice",  # of these pairs' scores, one for each head, those that took both steps
    "skipped_mlp",  # of the rows that ran the layer, those that took a shortcut past the MLP
    "skipped_attention",  # likewise past attention
    "fitted_macs",  # multiply-adds of fitted maps and gates after the layer and in it
    "fitted_bytes",  # bytes of fitted maps and gates, read once by each row that they were applied to
    "weight_bytes",  # bytes of any-precision weights read, each row for itself
    # multiply-adds of any-precision weights read in 0, 1, ... 8 bits; those at 0 were not done
    *(f"macs_at_{bits}" for bits in range(MAX_BITS + 1)),
    # rows for which each signal was computed after this layer; of "score", channels in it, for each of which one norm
    # is read too; of "query", queries in it whose weights were estimated first; of "entry", keys and values that
    # were turned into codes
    *(f"signal_{name}" for name in SIGNALS),
    "halted",  # tokens that halted after this layer
    "fusion_rows",  # rows that reached fusion after this layer
    "fused",  # tokens that were absorbed by a later one after this layer
    "rule_macs",  # multiply-adds that rules report beside their signals
)
COUNT = {name: place for place, name in enumerate(_NAMES)}
"""Where each count of a layer lies in `Trace.counts`; the compiled kernels are given these places."""

_MACS = slice(COUNT["macs_at_0"], COUNT["macs_at_0"] + MAX_BITS + 1)
_WEIGHT_BYTES, _FITTED_MACS, _FITTED_BYTES = COUNT["weight_bytes"], COUNT["fitted_macs"], COUNT["fitted_bytes"]
_LIMIT = 512  # counts on a device that are kept before they are asked for


def _pairs(length: int, window: int | None) -> int:
    """Return the pairs of a whole sequence; a window is in keys, the query's own included."""
    rising = length if window is None else min(length, window)
    return rising * (rising + 1) // 2 + (length - rising) * rising


class LayerCounts:
    """One layer's counts, read by the names of `COUNT`; `group_sizes` are fused groups by the tokens they stand for."""

    def __init__(self, counts: Sequence[int], group_sizes: Counter[int]) -> None:
        self._counts = counts
        self.group_sizes = group_sizes

    def __getattr__(self, name: str) -> int:
        if name not in COUNT:
            raise AttributeError(name)
        return self._counts[COUNT[name]]

    @property
    def macs_by_bits(self) -> list[int]:
        """[9] multiply-adds of any-precision weights read in 0, 1, ... 8 bits; those at 0 were not done."""
        return list(self._counts[_MACS])

    @property
    def signal_rows(self) -> Counter[str]:
        return +Counter({signal: getattr(self, f"signal_{signal}") for signal in SIGNALS})

    @property
    def shortcut_rows(self) -> dict[str, int]:
        return {"mlp": self.skipped_mlp, "attention": self.skipped_attention}


class Trace:
    """Counts of a run: one forward pass, or all passes of one `generate`.

    Args:
        num_layers: layers of the model.
        per_token: also keep, per pass, how many layers each token ran.
        entry_bits: bits of the keys and values that are read: 8 for codes with scales for groups of dimensions,
            None for the model's own.

    Attributes:
        counts: [layers, counts] int64, by `COUNT`; what a device has counted is in it once `layers` is read.
        rows: the same memory as an array, for counting one by one.
        tokens: tokens fed.
        head_rows: rows that the head was applied to for logits.
        fallbacks: how many times PyTorch ran a layer in the kernels' place, by why.
        kv_bytes, kv_used_bytes, kv_entries: of the cache at the end: bytes allocated, bytes of what is held, entries.
        depths: with `per_token`, for each pass the layers that each token ran, [N].
    """

    def __init__(self, num_layers: int, per_token: bool = False, entry_bits: int | None = None) -> None:
        self._num_layers = num_layers
        self.counts = torch.zeros((num_layers, len(COUNT)), dtype=torch.int64)
        self.rows = self.counts.numpy()
        self._group_sizes: list[Counter[int]] = [Counter() for _ in range(num_layers)]
        self._on_device: list[tuple[int, int, Tensor]] = []
        self.tokens = 0
        self.head_rows = 0
        self._ends: Counter[int] = Counter()  # lengths up to which sequences were fed, less those from which on
        self.kv_bytes = 0
        self.kv_used_bytes = 0
        self.kv_entries = 0
        self.fallbacks: Counter[str] = Counter()
        self.per_token = per_token
        self.entry_bits = entry_bits
        self.depths: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds: all that has been counted."""
        self._read_device()
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows = self.counts.numpy()

    @property
    def layers(self) -> list[LayerCounts]:
        """Counts of each layer, complete."""
        self._read_device()
        return [LayerCounts(row, sizes) for row, sizes in zip(self.counts.tolist(), self._group_sizes, strict=True)]

    def add(self, layer_idx: int, place: int, value: int | Tensor) -> None:
        """Add to a count a host integer, or a scalar on a device without waiting for it."""
        if isinstance(value, Tensor):
            self._on_device.append((layer_idx, place, value))
            if len(self._on_device) >= _LIMIT:
                self._read_device()
        else:
            self.rows[layer_idx, place] += value

    def add_channels(
        self, layer_idx: int, channels: Sequence[int], num_outputs: int, channel_bytes: Sequence[int]
    ) -> None:
        """Count a quantized map's application: channels of all rows read in 0, 1, ... 8 bits, and a channel's bytes."""
        row = self.rows[layer_idx]
        for bits, count in enumerate(channels):
            if count:
                row[_MACS.start + bits] += count * num_outputs
                row[_WEIGHT_BYTES] += count * channel_bytes[bits]

    def add_signals(self, layer_idx: int, signal_rows: Mapping[str, int], macs: int = 0) -> None:
        """Count the rows of each signal computed after a layer, and what a rule reports beside them."""
        row = self.rows[layer_idx]
        for signal, rows in signal_rows.items():
            row[COUNT[f"signal_{signal}"]] += rows
        row[COUNT["rule_macs"]] += macs

    def record_fitted(self, layer_idx: int, rows: int, macs: int, nbytes: int) -> None:
        """Count a fitted map or gate of so many multiply-adds and bytes, applied to `rows` rows."""
        self.rows[layer_idx, _FITTED_MACS] += rows * macs
        self.rows[layer_idx, _FITTED_BYTES] += rows * nbytes

    def begin_pass(self, starts: Sequence[int], layout: RaggedLayout) -> None:
        """Count the tokens entering a pass, and note where they stand."""
        for start, length in zip(starts, layout.lengths, strict=True):
            self.tokens += length
            self._ends[start + length] += 1
            self._ends[start] -= 1
        if self.per_token:
            depth = torch.full((layout.num_tokens,), self._num_layers, device=layout.origin.device)
            self.depths.append(depth)

    def dense_pairs(self, window: int | None = None) -> int:
        """Return the (query, key) pairs that dense causal attention scores in a layer whose queries see so far back."""
        return sum(count * _pairs(length, window) for length, count in self._ends.items())

    def record_halt(self, layer_idx: int, origin: Tensor) -> None:
        """Record the tokens ([M] origins) that halted after a layer."""
        self.rows[layer_idx, COUNT["halted"]] += origin.shape[0]
        self._record_depth(layer_idx, origin)

    def record_fusion(self, layer_idx: int, origin: Tensor, fused: int, sizes: Mapping[int, int]) -> None:
        """Record what fusion after a layer did.

        Args:
            layer_idx: the layer.
            origin: [M] origins of this pass's tokens that were absorbed.
            fused: tokens absorbed, those of earlier passes included.
            sizes: groups by size, to be added; negative where one has grown.
        """
        self.rows[layer_idx, COUNT["fused"]] += fused
        self._group_sizes[layer_idx].update(sizes)
        self._record_depth(layer_idx, origin)

    def record_cache(self, allocated: int, used: int, entries: int) -> None:
        """Record the cache after a pass: bytes allocated, bytes of what is held, and entries."""
        self.kv_bytes, self.kv_used_bytes, self.kv_entries = allocated, used, entries

    @property
    def group_sizes(self) -> dict[int, int]:
        """Fused groups by the tokens they stand for; below zero where one that another trace has counted has grown."""
        sizes: Counter[int] = Counter()
        for each in self._group_sizes:
            sizes.update(each)
        return {size: count for size, count in sorted(sizes.items()) if count}

    @property
    def fused_fraction(self) -> float:
        """Share of the tokens fed that a later token absorbed."""
        return self.total("fused") / max(self.tokens, 1)

    @property
    def entries_read(self) -> int:
        """Cache entries that queries read, over all passes, layers and sequences."""
        return self.total("entries_read")

    def values_read(self, num_heads: int) -> float:
        """Share of the values of scored (query, key) pairs that their `num_heads` heads read, over all layers."""
        return 1.0 - self.total("values_skipped") / max(num_heads * self.total("attended"), 1)

    def query_components_read(self, num_heads: int, head_dim: int) -> float:
        """Share of the multiply-adds of scores that were done, of queries of `num_heads` heads of size `head_dim`."""
        return 1.0 - self.total("scores_skipped") / max(num_heads * head_dim * self.total("attended"), 1)

    @property
    def macs_by_bits(self) -> list[int]:
        """[9] multiply-adds of any-precision weights read at 0, 1, ... 8 bits, over all layers; those at 0 not done."""
        self._read_device()
        return self.counts[:, _MACS].sum(0).tolist()

    @property
    def mean_depth(self) -> float:
        """Layers run per token, on average."""
        return self.total("query_rows") / max(self.tokens, 1)

    def total(self, name: str) -> int:
        self._read_device()
        return int(self.counts[:, COUNT[name]].sum())

    def _record_depth(self, layer_idx: int, origin: Tensor) -> None:
        if self.per_token and origin.shape[0]:
            self.depths[-1].index_fill_(0, origin, layer_idx + 1)

    def _read_device(self) -> None:
        """Add what devices have counted; they are asked once."""
        if self._on_device:
            pending, self._on_device = self._on_device, []
            for (layer_idx, place, _), value in zip(
                pending, torch.stack([value.long() for *_, value in pending]).tolist(), strict=True
            ):
                self.rows[layer_idx, place] += value
