"""Thresholds of precision rules from calibration text: one pass that keeps histograms, then arithmetic.

Nothing here ranks tokens at run time: what comes out is absolute thresholds, fixed before any text is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quicksilver.calibrate.histograms import NUM_BINS, histogram, quantiles, share_above
from quicksilver.calibrate.observe import Advance, observing, run_window, watchable
from quicksilver.core.decisions import ChannelView, TokenBitsView
from quicksilver.errors import InputError, PlanError
from quicksilver.families.spec import Adapter
from quicksilver.plan import Plan
from quicksilver.rules import ChannelBitsRule, GradedBitsRule, PrecisionConfig
from quicksilver.rules.precision.graded import Thresholds
from quicksilver.runtime.loop import Decoder
from quicksilver.runtime.protection import Protection
from quicksilver.weights import AnyPrecisionLinear

_BISECTIONS = 80


def fit(
    adapter: Adapter,
    plan: Plan,
    windows: Sequence[Tensor],
    on_window: Advance = lambda: None,
    special_ids: Sequence[int] = (),
) -> Plan:
    """Return a plan whose thresholds of bits are fitted; any other plan as it is.

    Shares are met for each linear map. A mean number of bits is met over all maps together, where every bit is spent
    where it takes away most of the squared error of the maps' outputs: at the optimum a bit is worth the same
    everywhere (the Lagrangian of rate and distortion; Shoham and Gersho 1988). Tokens that the plan protects do not
    count: they read all bits whatever the thresholds are. Windows are token ids [T], each run on its own.

    Raises:
        PlanError: the model's weights are not quantized, or the plan would not fit the model once fitted.
        InputError: no window holds a token that is not protected.
    """
    if plan.precision is None or plan.precision.rule.is_fitted:
        return plan
    _check(adapter, plan, plan.precision)
    text = unprotected(adapter, plan.precision, windows, special_ids)
    if not any(len(window.rows) for window in text):
        problem = "the calibration text holds no tokens but protected ones" if text else "no calibration text was given"
        raise InputError(f"plan {plan.name!r}: nothing to fit bits to: {problem}")
    rule = plan.precision.rule
    if isinstance(rule, ChannelBitsRule):
        rule = _fit_channels(rule, adapter, text, on_window)
    elif isinstance(rule, GradedBitsRule):
        rule = _fit_tokens(rule, adapter, text, on_window)
    else:
        raise PlanError(f"{type(rule).__name__} has no thresholds that could be fitted")
    return replace(plan, precision=replace(plan.precision, rule=rule))


def _check(adapter: Adapter, plan: Plan, precision: PrecisionConfig) -> None:
    """Raise PlanError where the plan could not be run with any thresholds."""
    spec, num_maps = adapter.spec, len(adapter.layers[0].quantized)
    if not spec.is_quantized:
        raise PlanError(f"plan {plan.name!r}: bits are fitted to any-precision weights, the model's are plain")
    if precision.rule.reads_means:
        raise PlanError(f"plan {plan.name!r}: a rule that centres inputs is made by `quicksilver calibrate`")
    try:
        precision.rule.check_maps(spec.num_layers, num_maps)
    except PlanError as error:
        raise PlanError(f"plan {plan.name!r}: {error}") from None
    replace(plan, precision=None).check_model(spec.num_layers, num_maps, spec.hidden_size)


@dataclass(frozen=True)
class Text:
    """A piece of calibration text, run at once."""

    token_ids: Tensor  # [T]
    rows: Tensor  # [K] which of them are not protected


def unprotected(
    adapter: Adapter, precision: PrecisionConfig, windows: Sequence[Tensor], special_ids: Sequence[int]
) -> list[Text]:
    """Return calibration text, windows of token ids [T], with the rows that a configuration does not protect."""
    protection, text = Protection(precision, special_ids, adapter.spec.device), []
    for window in windows:
        ids = window.to(adapter.spec.device)
        covered = protection.covers(ids, torch.arange(len(ids), device=ids.device))
        text.append(Text(ids, (~covered).nonzero().squeeze(-1)))
    return text


def _fit_tokens(rule: GradedBitsRule, adapter: Adapter, text: Sequence[Text], on_window: Advance) -> GradedBitsRule:
    """Collect tokens' scores at the rule's layer, by running the model up to there."""
    after = rule.after_layer(adapter.spec.num_layers)
    if after is None or not isinstance(rule.target, tuple):
        raise PlanError(f"{type(rule).__name__}: only rules by channel, and shares of tokens, can be fitted")
    decoder = Decoder(adapter.cut_behind(after), Plan.dense())
    counts = torch.zeros(NUM_BINS, dtype=torch.int64)
    for window in text:
        hidden = run_window(decoder, window.token_ids)[window.rows]
        scores, _ = rule.score(TokenBitsView(hidden, adapter.head_entropy))
        counts += histogram(scores)
        on_window()
    return rule.fitted(quantiles(counts, rule.target))


@dataclass(frozen=True)
class MapScores:
    """What is known of one linear map."""

    counts: Tensor  # histogram of its channels' scores
    num_inputs: int  # channels
    num_outputs: int  # multiply-adds of a channel
    # what a squared score is worth: leaving the channel out causes that squared error in the map's output; it is taken
    # relative to the output's mean square
    worth: float
    lost: tuple[float, ...]  # for each of the rule's bits, the share of the squared weights that reading so few loses

    @property
    def cost(self) -> int:
        return self.num_inputs * self.num_outputs


def _fit_channels(rule: ChannelBitsRule, adapter: Adapter, text: Sequence[Text], on_window: Advance) -> ChannelBitsRule:
    maps = collect_scores(rule, adapter, text, on_window)
    if isinstance(rule.target, tuple):
        return rule.fitted(tuple(quantiles(each.counts, rule.target) for each in maps))
    assert rule.target is not None
    return rule.fitted(_balance(maps, rule.bits, rule.target))


def collect_scores(
    rule: ChannelBitsRule,
    adapter: Adapter,
    text: Sequence[Text],
    on_window: Advance = lambda: None,
    means: Sequence[Tensor] | None = None,
) -> list[MapScores]:
    """Return the scores of each map's channels under a rule, less their means where given, from one dense pass."""
    modules = [module for layer in adapter.layers for module in layer.quantized]
    counts = torch.zeros((len(modules), NUM_BINS), dtype=torch.int64)
    power = [0.0] * len(modules)

    def observe(i: int, module: AnyPrecisionLinear, inputs: Tensor, output: Tensor) -> None:
        inputs = inputs if means is None else inputs - means[i].to(inputs)
        view = ChannelView(0, i, len(modules), inputs, lambda: module.channel_norms, None)
        counts[i] += histogram(rule.score(view)[0])
        product = output if module.bias is None else output - module.bias
        power[i] += float(product.double().square().sum())

    num_rows = _watch_maps(adapter, modules, text, observe, on_window)
    return [
        _map_scores(rule, module, each, total / num_rows)
        for module, each, total in zip(modules, counts, power, strict=True)
    ]


def collect_means(adapter: Adapter, text: Sequence[Text], on_window: Advance = lambda: None) -> list[Tensor]:
    """Return the mean of each quantized map's inputs, [in] float32, layer after layer, from one dense pass."""
    modules = [module for layer in adapter.layers for module in layer.quantized]
    sums = [torch.zeros(module.num_inputs, dtype=torch.float64, device=adapter.spec.device) for module in modules]

    def observe(i: int, module: AnyPrecisionLinear, inputs: Tensor, output: Tensor) -> None:
        sums[i] += inputs.double().sum(0)

    num_rows = _watch_maps(adapter, modules, text, observe, on_window)
    return [(each / num_rows).float() for each in sums]


def _watch_maps(
    adapter: Adapter,
    modules: Sequence[AnyPrecisionLinear],
    text: Sequence[Text],
    see: Callable[[int, AnyPrecisionLinear, Tensor, Tensor], None],
    on_window: Advance,
) -> int:
    """Run the dense model over text, and show each map's inputs and outputs, of unprotected rows; return how many."""

    def observe(i: int, module: AnyPrecisionLinear, args: tuple[Any, ...], output: Tensor) -> None:
        see(i, module, args[0][rows], output[rows])

    with observing(modules, observe):
        decoder = Decoder(watchable(adapter), Plan.dense())
        for window in text:
            rows = window.rows  # where `observe` looks: all tokens run every layer, in their order
            run_window(decoder, window.token_ids)
            on_window()
    return sum(len(window.rows) for window in text)


def _map_scores(rule: ChannelBitsRule, module: AnyPrecisionLinear, counts: Tensor, power: float) -> MapScores:
    weight = module.dequantize()
    total = max(float(weight.double().square().sum()), 1e-30)
    lost = tuple(
        float((weight - module.dequantize(bits)).double().square().sum()) / total if bits else 1.0 for bits in rule.bits
    )
    return MapScores(counts, module.num_inputs, module.num_outputs, 1.0 / max(power, 1e-30), lost)


def _balance(maps: Sequence[MapScores], bits: tuple[int, ...], target: float) -> tuple[Thresholds, ...]:
    """Return each map's thresholds at the price of a bit at which `target` bits are read on average."""
    low, high, total = -200.0, 200.0, sum(each.cost for each in maps)
    for _ in range(_BISECTIONS):
        log2_price = (low + high) / 2
        spent = sum(each.cost * _mean_bits(each, bits, thresholds(each, bits, 2.0**log2_price)) for each in maps)
        if spent > target * total:
            low = log2_price
        else:
            high = log2_price
    return tuple(thresholds(each, bits, 2.0**high) for each in maps)


def thresholds(
    scores: MapScores, bits: tuple[int, ...], bit_price: float, mac_price: float = 0.0, weight: float = 1.0
) -> Thresholds:
    """Return the scores from which on each of `bits`, descending, is worth what it costs more than the next.

    A channel of score s loses `s ** 2 * lost * worth * weight` at so many bits, and costs `num_outputs` multiply-adds
    unless it is left out, and `bits * num_outputs` bits. Prices are in the unit of `weight`.
    """
    limits = []
    for (many, few), (less, more) in zip(pairwise(bits), pairwise(scores.lost), strict=True):
        saved = scores.num_outputs * ((many - few) * bit_price + (mac_price if few == 0 else 0.0))
        limits.append(math.sqrt(saved / (max(more - less, 1e-30) * scores.worth * max(weight, 1e-30))))
    # Where further bits are worth more each than those below them (a dent in what the bits
    # lose), the one between is passed over. Its neighbours then meet at the higher of its limits; on the convex hull
    # they would meet between the two. Fewer bits are read so, and the price makes up for that.
    for i in range(len(limits) - 2, -1, -1):
        limits[i] = max(limits[i], limits[i + 1])
    return tuple(limits)


def _mean_bits(scores: MapScores, bits: tuple[int, ...], limits: Thresholds) -> float:
    above = [0.0, *(share_above(scores.counts, limit) for limit in limits), 1.0]
    return sum(each * (upto - before) for each, (before, upto) in zip(bits, pairwise(above), strict=True))
