"""Quantized maps by PyTorch or map by map by the kernels: ask the rule how many bits are read, read them, count them.

The rules themselves are in `quicksilver.rules`; reading is `quicksilver.weights`'s.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quicksilver.backends.resolved import ResolvedPlan
from quicksilver.backends.state import PassContext
from quicksilver.core.bits import MAX_BITS, WEIGHT_BITS
from quicksilver.core.decisions import ChannelView
from quicksilver.core.trace import Trace
from quicksilver.errors import PlanError
from quicksilver.families.spec import Adapter, Apply
from quicksilver.weights import AnyPrecisionLinear


class _Rows(NamedTuple):
    """Rows of a layer: its index, what counts, their bits at most [M], and which of them read all bits [M]."""

    layer_idx: int
    trace: Trace
    max_bits: Tensor | None
    protected: Tensor | None


class MapReader:
    """A plan's precision bound to a model's quantized maps."""

    def __init__(self, adapter: Adapter, plan: ResolvedPlan) -> None:
        self._plan, self._rule, self._kernels = plan.layers, plan.bits, adapter.kernels
        self._num_maps = len(adapter.layers[0].quantized)
        self._map_idx = {id(module): i for layer in adapter.layers for i, module in enumerate(layer.quantized)}

    def bound(self, layer_idx: int, origins: Tensor, max_bits: Tensor | None, context: PassContext) -> Apply:
        """Return the function that applies a layer's maps to rows of the pass's tokens `origins` [M].

        `max_bits` [N] uint8 are the most bits that each token of the pass may read, None for no limit.
        """
        protected = context.protected.bits
        if self._rule is None:
            max_bits = protected = None
        given = (None if t is None else t.index_select(0, origins) for t in (max_bits, protected))
        return partial(self._apply, _Rows(layer_idx, context.trace, *given))

    def _apply(self, rows: _Rows, module: AnyPrecisionLinear, x: Tensor) -> Tensor:
        centre, product = self._plan[rows.layer_idx].centres.get(id(module)), None
        if centre is not None:
            mean, product = centre.bind(x)
            rows.trace.record_fitted(rows.layer_idx, x.shape[0], 0, mean.nbytes + product.nbytes)
            x = x - mean
        bits = self._choose(rows, module, x)
        counts = _channels_by_bits(bits, x)
        present = [each for each, count in enumerate(counts) if each and count]
        if not set(present) <= set(WEIGHT_BITS):
            raise PlanError(f"{type(self._rule).__name__}.decide must give 0, 2, 4, 6 or 8 bits, got {present}")
        counts[module.bits :] = [sum(counts[module.bits :])]  # of more bits than codes have, all are read
        rows.trace.add_channels(rows.layer_idx, counts, module.num_outputs, module.channel_bytes)
        y = module(x, bits=bits, present=present, kernels=self._kernels)
        return y if product is None else y + product

    def _choose(self, rows: _Rows, module: AnyPrecisionLinear, x: Tensor) -> int | Tensor:
        """Return how many bits are read: one number, [N] uint8 for each row, or [N, in] for each of its channels."""
        if self._rule is None:
            return MAX_BITS
        map_idx, protected = self._map_idx[id(module)], rows.protected
        view = ChannelView(rows.layer_idx, map_idx, self._num_maps, x, lambda: module.channel_norms, rows.max_bits)
        choice = self._rule.ask(view)
        rows.trace.add_signals(rows.layer_idx, choice.signal_rows, choice.macs)
        bits = choice.bits
        if protected is None or (isinstance(bits, int) and bits == MAX_BITS):
            return bits
        if isinstance(bits, int):
            bits = torch.full((x.shape[0],), bits, dtype=torch.uint8, device=x.device)
        return bits.masked_fill(protected if bits.dim() == 1 else protected[:, None], MAX_BITS)


def _channels_by_bits(bits: int | Tensor, x: Tensor) -> list[int]:
    """Return how many input channels of x ([M, in]), over all rows, are read in 0, 1, ... 8 bits."""
    if isinstance(bits, int):
        return [x.numel() if each == bits else 0 for each in range(MAX_BITS + 1)]
    counts = torch.bincount(bits.flatten().int(), minlength=MAX_BITS + 1)
    return (counts * x.shape[1] if bits.dim() == 1 else counts).tolist()
