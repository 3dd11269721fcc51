"""Halting: the rules that say which tokens have settled: each one's name, configuration, needs and decision.

A rule is asked after a layer and answers with data. Its decision imports PyTorch when it is first made, so that plans
are read, checked and shown without.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import (
    LARGE,
    Threshold,
    check_count,
    check_draw,
    check_parts,
    check_protection,
    check_threshold,
    is_whole,
    threshold_at,
)
from quicksilver.rules.registry import DecidingRule, RuleTypes


@dataclass(frozen=True)
class HaltingRule(DecidingRule[LayerView, HaltDecision]):
    """Base of the rules that say which tokens in view have settled, and halt after this layer.

    Attributes:
        rule_fields: names of the fields that hold rules themselves, each a tuple of them.
    """

    rule_fields: ClassVar[tuple[str, ...]] = ()

    @property
    def reads_gates(self) -> bool:
        """Whether the rule reads the plan's fitted gates, which are then in `LayerView.gate`."""
        return False

    @property
    def reads_previous_update(self) -> bool:
        """Whether the rule reads what the layer before added, which is then in `LayerView.previous_update`."""
        return False

    def may_halt(self, layer_idx: int, first: int | None = None) -> bool:
        """Whether the rule could halt anything after this layer; where not, it need not be asked.

        Args:
            layer_idx: the layer.
            first: the first layer after which anything may halt, where every row is one token's throughout: a depth
                that is forced is then reached once. None where rows may take one another's places.
        """
        return True

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where the rule does not fit a model of `num_layers` layers."""


HALTING_RULES: RuleTypes[HaltingRule] = RuleTypes("halting rule", HaltingRule)
halting_rule = HALTING_RULES.register


@dataclass(frozen=True)
class ThresholdRule(HaltingRule):
    """A rule that halts a token when its signal is below an absolute threshold."""

    threshold: Threshold

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_threshold(type(self).__name__, self.threshold))

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where a list of thresholds is not as long as the model is deep."""
        check_count(self.threshold, num_layers)


@halting_rule("drift")
@dataclass(frozen=True)
class DriftRule(ThresholdRule):
    """The paper's signal: `||h[l] - h[l-1]||_2`, in the units of the residual stream (arXiv 2506.22396)."""

    def decide(self, view: LayerView) -> HaltDecision:
        """Halt where `||after - before||_2` is below the threshold."""
        from quicksilver.core import signals

        drift = signals.row_norms(signals.update_of(view))  # [N]
        return HaltDecision(drift < threshold_at(self.threshold, view.layer_idx), {"norm": view.num_rows})


@halting_rule("relative")
@dataclass(frozen=True)
class RelativeDriftRule(ThresholdRule):
    """`||h[l] - h[l-1]||_2 / ||h[l]||_2`, free of the stream's scale."""

    def decide(self, view: LayerView) -> HaltDecision:
        """Halt where the relative drift is below the threshold."""
        from quicksilver.core import signals

        small = signals.relative_drift(view) < threshold_at(self.threshold, view.layer_idx)
        return HaltDecision(small, {"norm": 2 * view.num_rows})


@halting_rule("fixed_point")
@dataclass(frozen=True)
class FixedPointRule(ThresholdRule):
    """Relative update norm below `threshold` and cosine of successive updates at least `min_cosine`."""

    min_cosine: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.min_cosine, (int, float)) or not -1.0 <= self.min_cosine <= 1.0:
            raise PlanError(f"FixedPointRule: min_cosine must lie in [-1, 1], got {self.min_cosine!r}")

    @property
    def reads_previous_update(self) -> bool:
        """True: successive updates are compared."""
        return True

    def decide(self, view: LayerView) -> HaltDecision:
        """Halt where relative drift is below the threshold and `cos(u[l], u[l-1])` at least `min_cosine`."""
        from quicksilver.core import signals

        if view.previous_update is None:
            return HaltDecision(signals.nobody(view))
        small = signals.relative_drift(view) < threshold_at(self.threshold, view.layer_idx)
        steady = signals.update_cosine(view) >= self.min_cosine
        return HaltDecision(small & steady, {"norm": 2 * view.num_rows, "cosine": view.num_rows})


@halting_rule("entropy")
@dataclass(frozen=True)
class EntropyRule(ThresholdRule):
    """Entropy, in bits, of the model's own head applied to the state; checked only at `layers` if given."""

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            return
        layers = tuple(self.layers) if isinstance(self.layers, (tuple, list)) else (-1,)
        if any(not is_whole(i) or i < 0 for i in layers):
            raise PlanError(f"EntropyRule: layers must be non-negative layer indices, got {self.layers!r}")
        object.__setattr__(self, "layers", layers)

    def may_halt(self, layer_idx: int, first: int | None = None) -> bool:
        """Whether the layer is one of the rule's."""
        return self.layers is None or layer_idx in self.layers

    def decide(self, view: LayerView) -> HaltDecision:
        """Halt where the entropy, in bits, is below the threshold; only at the rule's layers."""
        from quicksilver.core import signals

        if not self.may_halt(view.layer_idx):
            return HaltDecision(signals.nobody(view))
        entropy = view.head_entropy(view.after)  # [N]
        return HaltDecision(entropy < threshold_at(self.threshold, view.layer_idx), {"head": view.num_rows})

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where thresholds or layers do not fit the depth."""
        super().check_depth(num_layers)
        if self.layers and max(self.layers) >= num_layers:
            raise PlanError(f"entropy is asked for after layer {max(self.layers)}, the model has {num_layers}")


@halting_rule("fitted")
@dataclass(frozen=True)
class FittedRule(ThresholdRule):
    """What a fitted gate predicts that halting would cost, in nats: KL(full prediction || the halted token's).

    The gates are the plan's tensors `gate.LAYER.weight`, [d + 4]: of the state over its root mean square, of the
    logarithm of the relative update's norm, of the cosine of successive updates, of the logarithm of the state's
    norm, and a constant; their product is the logarithm of the nats. A layer without a gate halts nobody.
    """

    @property
    def reads_gates(self) -> bool:
        """True: they are what is asked."""
        return True

    @property
    def reads_previous_update(self) -> bool:
        """True: the cosine of successive updates is a feature."""
        return True

    def decide(self, view: LayerView) -> HaltDecision:
        """Halt where `exp(features . gate)` is below the threshold; nowhere after a layer without a gate."""
        from quicksilver.core import signals

        if view.gate is None:
            return HaltDecision(signals.nobody(view))
        features = signals.gate_features(view.before, view.after, view.previous_update)
        log_nats = features @ view.gate[:-1] + view.gate[-1]  # [N]
        threshold, rows = threshold_at(self.threshold, view.layer_idx), view.num_rows
        limit = math.log(threshold) if threshold > 0.0 else -math.inf
        costs = {"norm": 3 * rows} if view.previous_update is None else {"norm": 3 * rows, "cosine": rows}
        return HaltDecision(log_nats < limit, costs, gate_rows=rows)


@halting_rule("forced")
@dataclass(frozen=True)
class ForcedRule(HaltingRule):
    """The token at position p runs `depths[p % len(depths)]` layers: a fixed pattern, for tests and timing."""

    depths: tuple[int, ...]

    def __post_init__(self) -> None:
        depths = tuple(self.depths) if isinstance(self.depths, (tuple, list)) else ()
        if not depths or any(not is_whole(n) or not 1 <= n < LARGE for n in depths):
            raise PlanError(f"ForcedRule: depths must be whole numbers of at least 1, got {self.depths!r}")
        object.__setattr__(self, "depths", depths)

    def may_halt(self, layer_idx: int, first: int | None = None) -> bool:
        """Whether a token's depth may have been reached."""
        reached = layer_idx + 1 >= min(self.depths)
        return reached and (first is None or layer_idx == first or layer_idx + 1 in self.depths)

    def decide(self, view: LayerView) -> HaltDecision:
        """Halt the tokens whose prescribed depth has been reached."""
        from quicksilver.core import signals

        depths = signals.pattern(self.depths, view.positions.device)
        return HaltDecision(depths[view.positions % len(self.depths)] <= view.layer_idx + 1)


@halting_rule("random")
@dataclass(frozen=True)
class RandomRule(HaltingRule):
    """The control: after each layer a token halts with `probability`, drawn from (seed, layer, position, token)."""

    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_draw("RandomRule", self.probability, self.seed)

    def decide(self, view: LayerView) -> HaltDecision:
        """Halt each token with the rule's probability."""
        from quicksilver.core.hashing import hashed_uniform

        draws = hashed_uniform(self.seed, view.layer_idx, view.positions, view.token_ids)
        return HaltDecision(draws < self.probability)


@halting_rule("all")
@dataclass(frozen=True)
class AllRule(HaltingRule):
    """Halts where every rule would, asked in the order given; a later one only about tokens that passed the earlier."""

    rule_fields: ClassVar[tuple[str, ...]] = ("rules",)
    rules: tuple[HaltingRule, ...]

    def __post_init__(self) -> None:
        check_parts(self, "AllRule", ": ")
        if not self.rules:
            raise PlanError("AllRule: at least one rule is needed")

    @property
    def reads_gates(self) -> bool:
        """Whether a member reads the plan's fitted gates."""
        return any(rule.reads_gates for rule in self.rules)

    @property
    def reads_previous_update(self) -> bool:
        """Whether a member compares successive updates."""
        return any(rule.reads_previous_update for rule in self.rules)

    def may_halt(self, layer_idx: int, first: int | None = None) -> bool:
        """Whether every member could; that one's depth was reached before says nothing about the others."""
        return all(rule.may_halt(layer_idx) for rule in self.rules)

    def decide(self, view: LayerView) -> HaltDecision:
        """Halt where every member would."""
        decision = self.rules[0].ask(view)
        halt, costs = decision.halt, Counter(decision.signal_rows)
        gate_rows, macs = decision.gate_rows, decision.macs
        for rule in self.rules[1:]:
            open_rows = halt.nonzero().squeeze(-1)
            if open_rows.shape[0] == 0:
                break
            decision = rule.ask(view.select(open_rows))
            halt = halt.index_copy(0, open_rows, decision.halt)
            costs.update(decision.signal_rows)
            gate_rows += decision.gate_rows
            macs += decision.macs
        return HaltDecision(halt, costs, gate_rows, macs)

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where a member does not fit the depth."""
        for rule in self.rules:
            rule.check_depth(num_layers)


@dataclass(frozen=True)
class HaltingConfig:
    """Which tokens halt, and which never may.

    Attributes:
        rule: says which tokens have settled.
        min_layer: layers that every token runs; a whole number, or a fraction of the depth in (0, 1).
        protect_first: tokens at positions below this never halt (attention sinks).
        protect_special: special tokens (BOS, EOS, ...) never halt.
    """

    rule: HaltingRule
    min_layer: int | float = 2
    protect_first: int = 4
    protect_special: bool = True

    def __post_init__(self) -> None:
        check_parts(self, "halting")
        whole = is_whole(self.min_layer) and self.min_layer >= 1
        if not whole and not (isinstance(self.min_layer, float) and 0.0 < self.min_layer < 1.0):
            raise PlanError(f"halting.min_layer must be at least 1, or a fraction in (0, 1), got {self.min_layer!r}")
        check_protection("halting", self.protect_first, self.protect_special)

    def first_halt(self, num_layers: int) -> int:
        """Index of the first layer after which a token may halt in a model of `num_layers` layers."""
        if isinstance(self.min_layer, int):
            return self.min_layer - 1
        return math.ceil(self.min_layer * num_layers) - 1

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where the configuration does not fit a model of `num_layers` layers."""
        if isinstance(self.min_layer, int) and self.min_layer > num_layers:
            raise PlanError(f"min_layer is {self.min_layer}, the model has {num_layers} layers")
        self.rule.check_depth(num_layers)
