"""What each unit of work is worth to a model's predictions: one disturbed at a time, on a little calibration text.

The measure is KL(full prediction || disturbed prediction), which is far less noisy than a difference of losses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from quicksilver.calibrate.histograms import quantiles
from quicksilver.calibrate.observe import PROTECTED, run
from quicksilver.calibrate.outputs import divergence
from quicksilver.calibrate.widths import MapScores
from quicksilver.core.plan import Plan
from quicksilver.core.rules import AttentionConfig
from quicksilver.models.cost import executed_cost
from quicksilver.models.spec import Adapter
from quicksilver.quant import NestedLinear
from quicksilver.runtime.decoder import Decoder

SKIPPED = 0.5  # share of a map's channels that is left out to learn what its error is worth
VALUE_THRESHOLDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


class Probe:
    """Divergences from the dense model on some windows.

    Args:
        adapter: the model.
        windows: token ids [T] of calibration text, each run on its own; those of attention sinks alone do not count.
    """

    def __init__(self, adapter: Adapter, windows: Sequence[Tensor]) -> None:
        self.adapter = adapter
        self.windows = [window for window in windows if len(window) > PROTECTED]
        self._full = [run(adapter, window) for window in self.windows]

    @property
    def num_rows(self) -> int:
        """Tokens that divergences are taken of."""
        return sum(len(window) - PROTECTED for window in self.windows)

    def nats(self, plan: Plan | None = None) -> float:
        """Return the mean divergence of a plan's predictions, or of the model as it is now disturbed."""
        total = sum(
            float(divergence(self.adapter, full[PROTECTED:], run(self.adapter, window, plan)[PROTECTED:]).sum())
            for window, full in zip(self.windows, self._full, strict=True)
        )
        return max(total, 0.0) / self.num_rows

    def macs(self, plan: Plan) -> float:
        """Return the multiply-adds per token of a plan's layers on the first window."""
        decoder, window = Decoder(self.adapter, plan), self.windows[0]
        trace = decoder.new_trace()
        decoder.run(window.to(self.adapter.spec.device), [len(window)], decoder.new_cache(1), trace)
        return executed_cost(self.adapter.spec, trace).body_macs / len(window)


def map_weights(probe: Probe, scores: Sequence[MapScores], on_map: Callable[[], None] = lambda: None) -> list[float]:
    """Return for each nested map the nats that one unit of its relative squared error costs, layer after layer.

    Args:
        probe: on a model with nested weights.
        scores: of its maps, weighted by the norms of their channels' weights.
        on_map: called after each map.
    """
    modules = [module for layer in probe.adapter.layers for module in layer.nested]
    weights = []
    for module, each in zip(modules, scores, strict=True):
        (limit,) = quantiles(each.counts, (1.0 - SKIPPED, SKIPPED))
        with _skipping(module, limit) as skipped:
            nats = probe.nats()
        weights.append(nats / max(float(sum(skipped)) / probe.num_rows * each.worth, 1e-12))
        on_map()
    return weights


@contextmanager
def _skipping(module: NestedLinear, limit: float) -> Iterator[list[Tensor]]:
    """Leave out a map's channels of small score; gather the squared scores left out, of each call."""
    skipped: list[Tensor] = []
    norms = module.channel_norms

    def leave_out(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        scores = args[0].abs() * norms
        kept = scores >= limit
        kept[:PROTECTED] = True
        skipped.append(scores.masked_fill(kept, 0.0).double().square().sum())
        return (args[0].masked_fill(~kept, 0.0), *args[1:])

    hook = module.register_forward_pre_hook(leave_out)
    try:
        yield skipped
    finally:
        hook.remove()


def value_prices(probe: Probe, on_point: Callable[[], None] = lambda: None) -> list[tuple[float, float]]:
    """Return thresholds of value skipping, ascending, and the nats that one more multiply-add saved costs at each.

    Args:
        probe: on the model.
        on_point: called after each threshold.
    """
    points = [(0.0, probe.macs(Plan.dense()), 0.0)]
    for threshold in VALUE_THRESHOLDS:
        plan = Plan("values", attention=AttentionConfig(threshold))
        points.append((threshold, probe.macs(plan), probe.nats(plan)))
        on_point()
    prices: list[tuple[float, float]] = []
    for (_, macs_before, nats_before), (threshold, macs, nats) in itertools.pairwise(points):
        price = max(nats - nats_before, 0.0) / max(macs_before - macs, 1e-9)
        prices.append((threshold, max(price, prices[-1][1] if prices else 0.0)))
    return prices


def threshold_at_price(prices: Sequence[tuple[float, float]], price: float) -> float:
    """Return the largest threshold at which one more multiply-add saved costs at most a price, 0 where none does."""
    below, at_below = 0.0, 0.0
    for threshold, of_threshold in prices:
        if of_threshold > price:
            share = (price - at_below) / max(of_threshold - at_below, 1e-30)
            return below + share * (threshold - below)
        below, at_below = threshold, of_threshold
    return below
