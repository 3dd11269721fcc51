"""What each unit of work is worth to a model's predictions: one disturbed at a time, on a little calibration text.

The measure is KL(full prediction || disturbed prediction), which is far less noisy than a difference of losses.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quicksilver.calibrate.bits import MapScores
from quicksilver.calibrate.histograms import quantiles
from quicksilver.calibrate.observe import PROTECTED, run_window, watchable
from quicksilver.calibrate.outputs import divergence
from quicksilver.families.cost import executed_cost
from quicksilver.families.spec import Adapter
from quicksilver.plan import Plan
from quicksilver.rules import KVConfig, Threshold
from quicksilver.runtime.loop import Decoder
from quicksilver.weights import AnyPrecisionLinear

SKIPPED = 0.5  # share of a map's channels that is left out to learn what its error is worth
THRESHOLDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""At which leaving keys and values out is tried."""


class Probe:
    """Divergences from the dense model on windows of token ids [T], run one by one; attention sinks do not count."""

    def __init__(self, adapter: Adapter, windows: Sequence[Tensor]) -> None:
        self.adapter = watchable(adapter)  # disturbances are hooks
        self.windows = [window for window in windows if len(window) > PROTECTED]
        decoder = Decoder(self.adapter, Plan.dense())
        self._full = [run_window(decoder, window) for window in self.windows]

    @property
    def num_rows(self) -> int:
        """Tokens that divergences are taken of."""
        return sum(len(window) - PROTECTED for window in self.windows)

    def nats(self, plan: Plan | None = None) -> float:
        """Return the mean divergence of a plan's predictions, or of the model as it is now disturbed."""
        decoder = Decoder(self.adapter, plan or Plan.dense())
        total = sum(
            float(divergence(self.adapter, full[PROTECTED:], run_window(decoder, window)[PROTECTED:]).sum())
            for window, full in zip(self.windows, self._full, strict=True)
        )
        return max(total, 0.0) / self.num_rows

    def macs(self, plan: Plan) -> float:
        """Return the multiply-adds per token of a plan's layers on the first window."""
        decoder, window = Decoder(self.adapter, plan), self.windows[0]
        trace = decoder.new_trace()
        decoder.run(window.to(self.adapter.spec.device), [len(window)], decoder.new_cache(1), trace)
        return executed_cost(self.adapter.spec, trace).body_macs / len(window)


def map_weights(
    probe: Probe,
    scores: Sequence[MapScores],
    means: Sequence[Tensor] | None = None,
    on_map: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return for each quantized map the nats that one unit of its relative squared error costs, layer after layer.

    `means` are those of the maps' inputs, where channels that are left out stand at their mean.
    """
    modules = [module for layer in probe.adapter.layers for module in layer.quantized]
    weights = []
    for i, (module, each) in enumerate(zip(modules, scores, strict=True)):
        (limit,) = quantiles(each.counts, (1.0 - SKIPPED, SKIPPED))
        with _skipping(module, limit, None if means is None else means[i]) as skipped:
            nats = probe.nats()
        weights.append(nats / max(float(sum(skipped)) / probe.num_rows * each.worth, 1e-12))
        on_map()
    return weights


@contextmanager
def _skipping(module: AnyPrecisionLinear, limit: float, mean: Tensor | None) -> Iterator[list[Tensor]]:
    """Leave out a map's channels of small score; gather the squared scores left out, of each call."""
    skipped: list[Tensor] = []
    norms = module.channel_norms

    def leave_out(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        centre = torch.zeros_like(norms) if mean is None else mean
        scores = (args[0] - centre).abs() * norms
        kept = scores >= limit
        kept[:PROTECTED] = True
        skipped.append(scores.masked_fill(kept, 0.0).double().square().sum())
        return (torch.where(kept, args[0], centre.to(args[0])), *args[1:])

    hook = module.register_forward_pre_hook(leave_out)
    try:
        yield skipped
    finally:
        hook.remove()


@dataclass(frozen=True)
class AttentionPrices:
    """What one more multiply-add saved in attention costs, by a threshold."""

    points: tuple[
        tuple[float, float], ...
    ] = ()  # thresholds, ascending, and the nats per multiply-add at each, over all layers
    layers: tuple[float, ...] = ()  # for each layer, how much more than that it costs there

    def thresholds(self, nats_per_work: float) -> tuple[float, ...]:
        """Return for each layer the largest threshold at which one more multiply-add saved costs at most a price."""
        return tuple(threshold_at_price(self.points, nats_per_work / max(dearness, 1e-9)) for dearness in self.layers)


def attention_prices(probe: Probe, on_point: Callable[[], None] = lambda: None) -> AttentionPrices:
    """Measure some thresholds in all layers at once, and the middle one in each layer alone.

    Args:
        probe: on the model.
        on_point: called after each measurement, one for each threshold and each layer.
    """
    dense = probe.macs(Plan.dense())

    def measure(threshold: Threshold) -> tuple[float, float]:
        plan = Plan("attention", kv=KVConfig(skip_below=threshold))
        measured = dense - probe.macs(plan), probe.nats(plan)
        on_point()
        return measured

    points: list[tuple[float, float]] = []
    saved_before = nats_before = 0.0
    for threshold in THRESHOLDS:
        saved, nats = measure(threshold)
        nats_per_work = max(nats - nats_before, 0.0) / max(saved - saved_before, 1e-9)
        points.append((threshold, max(nats_per_work, points[-1][1] if points else 0.0)))
        saved_before, nats_before = saved, nats
    num_layers, middle = probe.adapter.spec.num_layers, THRESHOLDS[len(THRESHOLDS) // 2]
    alone = [measure(tuple(middle if i == layer else 0.0 for i in range(num_layers))) for layer in range(num_layers)]
    prices = [nats / max(saved, 1e-9) for saved, nats in alone]
    mean = sum(nats for _, nats in alone) / max(sum(saved for saved, _ in alone), 1e-9)
    return AttentionPrices(tuple(points), tuple(price / max(mean, 1e-30) for price in prices))


def threshold_at_price(prices: Sequence[tuple[float, float]], nats_per_work: float) -> float:
    """Return the largest threshold at which one more multiply-add saved costs at most a price, 0 where none does."""
    below, at_below = 0.0, 0.0
    for threshold, of_threshold in prices:
        if of_threshold > nats_per_work:
            share = (nats_per_work - at_below) / max(of_threshold - at_below, 1e-30)
            return below + share * (threshold - below)
        below, at_below = threshold, of_threshold
    return below
