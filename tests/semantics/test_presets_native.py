"""What presets ask for, run by the compiled kernels: a prompt and steps after it give the dense masked oracle's logits.

Every threshold lies in the widest gap among the numbers that the oracle compares with it, so that no decision is so
close that the kernels' rounding could take it otherwise: counts are equal, and logits differ by rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import quicksilver
from quicksilver import Plan, rules
from quicksilver.cache import RaggedKVCache
from quicksilver.core.signals import gate_features
from quicksilver.core.trace import Trace
from quicksilver.ops import native
from quicksilver.plan.tensors import PlanTensors
from quicksilver.rules import Part
from quicksilver.rules.precision.base import mean_name
from tests import oracle, tiny, tolerances
from tests.engines import FILLS
from tests.oracle_parts import linear_maps
from tests.rounding import rounded
from tests.semantics.test_precision import head_entropy

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")

LENGTH, PROMPT = 26, 18
SPECIAL, PROTECTED = 0, [0, 1, 2, 3, 9, 20]  # the first four, and where there is a special token
LAYERS = range(tiny.NUM_LAYERS)
HALTING_LAYERS = LAYERS[1:-1]
MARGIN = 5e-4  # least distance of a number from its threshold, of its size; products are off by 4e-5 of theirs
SEED = 17  # of tokens whose coded entries leave that distance
TIE = 1.5  # steps between codes: by so much keys move where activations are rounded otherwise
BITS = {"centred": (8, 0), "graded": (8, 6, 4, 2, 0), "uniform": (4,)}
HALTING = ("fitted", "settled", "drift")
CALIBRATED = ("centred", "shortcuts", "fitted", "skipping", "entries")
LARGE = tuple(1.0 - 0.01 * i for i in range(40))
"""Magnitudes of the components of the first step; one that no component is close to is taken."""


class Limits:
    """Thresholds as the oracle first meets what is compared with them, and the least distance of any from its own."""

    def __init__(self) -> None:
        self.found: dict[object, float] = {}
        self.margin = math.inf

    def at(self, place: object, compared: Tensor, shares: tuple[float, float] = (0.25, 0.55)) -> float:
        """Return a place's threshold: the middle of the widest gap between two shares of the positive numbers."""
        ordered = compared[compared.isfinite() & (compared > 0.0)].log().sort().values
        if place not in self.found:
            middle = ordered[int(shares[0] * len(ordered)) : int(shares[1] * len(ordered)) + 2]
            widest = int(middle.diff().argmax())
            self.found[place] = float(middle[widest : widest + 2].mean().exp())
        self.margin = min(self.margin, float((ordered - math.log(self.found[place])).abs().min()))
        return self.found[place]

    def at_both_steps(self, place: object, compared: oracle.Compared) -> float:
        """Return a place's threshold: the gap of the first step's numbers that is farthest from the second's, too."""

        def distance(limit: float) -> float:
            multiples = compared(limit)
            return float((multiples[multiples > 0.0] / limit).log().abs().min())

        if place not in self.found:
            ordered = compared(0.0)[0].flatten().sort().values
            ordered = ordered[(ordered > 0.1) & (ordered < 0.8)].log()
            widest = ordered.diff().topk(20).indices
            self.found[place] = max(((ordered[widest] + ordered[widest + 1]) / 2).exp().tolist(), key=distance)
        self.margin = min(self.margin, distance(self.found[place]))
        return self.found[place]

    def by_layer(self, name: str) -> tuple[float, ...]:
        """Return the thresholds of all layers, 0 where none was met."""
        return tuple(self.found.get((name, layer_idx), 0.0) for layer_idx in LAYERS)


def free(count: int) -> Tensor:
    """Return which tokens are not protected, [T] bool."""
    allowed = torch.ones(count, dtype=torch.bool)
    allowed[PROTECTED] = False
    return allowed


@dataclass
class Meaning:
    """Some of the presets' mechanisms, token by token, for the oracle; `plan` is the plan that they turn out to be."""

    model: Any
    mechanisms: frozenset[str]
    fill: rules.FillRule
    large: float = 1.0
    limits: Limits = field(default_factory=Limits)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits that channels are read at; none where all are read at 8."""
        return next((bits for name, bits in BITS.items() if name in self.mechanisms), ())

    def run(self, ids: Tensor, keep: oracle.Keep | None = None) -> oracle.OracleRun:
        """Return what the mechanisms give; thresholds that are not known yet are found on the way."""
        chosen = self.mechanisms
        skip_below = [partial(self.limits.at_both_steps, ("skipping", layer_idx)) for layer_idx in LAYERS]
        return oracle.run(
            self.model,
            ids,
            self.fill,
            self.halts if chosen & {*HALTING} else oracle.never,
            oracle.Fusion((1,), 2, "last", self.alike) if "fusion" in chosen else None,
            self.read if self.bits else whole,
            self.bypass if "shortcuts" in chosen else oracle.through,
            skip_below if "skipping" in chosen else None,
            self._estimate_dims_above,
            self.maps() if "fitted" in chosen else None,
            8 if "entries" in chosen else None,
            keep,
        )

    def _estimate_dims_above(self, compared: oracle.Compared) -> float:
        self.limits.found["large"] = self.large
        self.limits.at("large", compared(self.large))
        return self.large

    def read(self, layer_idx: int, module: Any, x: Tensor) -> Tensor:
        """Read of each channel what its distance from its mean, times the norm of its weights, deserves."""
        map_idx = next(i for i, each in enumerate(linear_maps(self.model, layer_idx)) if each is module)
        mean = torch.zeros(x.shape[1])
        if "centred" in self.mechanisms:  # what calibration on these very tokens would give
            mean = self.tensors.setdefault(mean_name(layer_idx, map_idx), x.mean(0))
        scores = (x - mean).abs() * module.dequantize().norm(dim=0)
        chosen = torch.full(scores.shape, self.bits[-1])
        for step in range(len(self.bits) - 2, -1, -1):  # from the least to the most bits
            share = 0.8 - 0.15 * step if len(self.bits) > 2 else 0.3
            limit = self.limits.at(("bits", layer_idx, map_idx, step), scores, (share - 0.1, share))
            chosen[scores >= limit] = self.bits[step]
        chosen[PROTECTED] = 8
        y = mean @ module.dequantize().T
        multiplied = rounded(x - mean, chosen > 0)
        for bits in {8, *self.bits} - {0}:
            y = y + torch.where(chosen == bits, multiplied, 0.0) @ module.dequantize(bits).T
        return y if module.bias is None else y + module.bias

    def bypass(self, layer_idx: int, part: Part, normed: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Let tokens past a sublayer where its gate predicts little; maps of MLPs are full, those of attention low."""
        name, of = f"shortcut.{layer_idx}.{part}", {}
        for key, value in tiny.shortcut_tensors(rank=None if part == "mlp" else 3).items():
            if key.startswith(f"{name}."):
                self.tensors[key] = of[key.removeprefix(f"{name}.")] = value
        features = torch.cat((normed, state.norm(dim=1, keepdim=True).log(), torch.ones(len(state), 1)), dim=1)
        errors = (features @ of["gate"]).exp()
        passes = (errors < self.limits.at((layer_idx, part), errors)) & free(len(state))
        weight = of["weight"] if part == "mlp" else of["down"] @ of["up"]
        return passes, normed @ weight + of["bias"]

    def halts(self, layer_idx: int, before: Tensor, after: Tensor, previous: Tensor | None) -> Tensor:
        """Halt where the layer's gate predicts few nats, or where states change little and the head is certain."""
        if layer_idx not in HALTING_LAYERS:
            return torch.zeros(len(after), dtype=torch.bool)
        if "fitted" in self.mechanisms:
            name = f"gate.{layer_idx}.weight"
            gate = self.tensors[name] = tiny.fitted()[name]
            nats = (gate_features(before, after, previous) @ gate[:-1] + gate[-1]).exp()
            return (nats < self.limits.at(("fitted", layer_idx), nats)) & free(len(after))
        drift = (after - before).norm(dim=1) / (after.norm(dim=1) if "settled" in self.mechanisms else 1.0)
        entropy, shares = head_entropy(self.model, after), (0.4, 0.8)
        small = drift < self.limits.at(("drift", layer_idx), drift, shares)
        return small & (entropy < self.limits.at(("entropy", layer_idx), entropy, shares)) & free(len(after))

    def maps(self) -> Mapping[int, Callable[[Tensor], Tensor]]:
        """Return the output maps: the first full, the last of low rank."""
        first, last = HALTING_LAYERS
        for layer_idx, fitted in ((first, tiny.fitted()), (last, tiny.fitted(rank=3))):
            self.tensors |= {key: value for key, value in fitted.items() if key.startswith(f"output.{layer_idx}.")}
        full, down, up = (self.tensors[f"output.{name}"] for name in (f"{first}.weight", f"{last}.down", f"{last}.up"))
        biases = [self.tensors[f"output.{layer_idx}.bias"] for layer_idx in HALTING_LAYERS]
        return {first: lambda hidden: hidden @ full + biases[0], last: lambda hidden: hidden @ down @ up + biases[1]}

    def alike(self, layer_idx: int, hidden: Tensor, earlier: int, later: int) -> bool:
        """Fuse two neighbours in a prompt where the angle between them is small."""
        distances = 1.0 - torch.cosine_similarity(hidden[:-1], hidden[1:], dim=-1)
        limit = self.limits.at("fusion", distances[: PROMPT - 1], (0.4, 0.8))
        allowed = free(len(hidden))
        return bool(later < PROMPT and allowed[earlier] and allowed[later] and distances[earlier] < limit)

    @property
    def bits_rule(self) -> rules.PrecisionRule:
        """The rule of the plan that chooses bits."""
        if "uniform" in self.mechanisms:
            return rules.UniformBitsRule(*self.bits)
        maps, steps, found = range(len(linear_maps(self.model, 0))), range(len(self.bits) - 1), self.limits.found
        limits = tuple(tuple(found["bits", i, j, k] for k in steps) for i in LAYERS for j in maps)
        return rules.ChannelBitsRule(limits, bits=self.bits, centred="centred" in self.mechanisms)

    @property
    def halting_rule(self) -> rules.HaltingRule:
        """The rule of the plan that halts tokens."""
        if "fitted" in self.mechanisms:
            return rules.FittedRule(self.limits.by_layer("fitted"))
        drift = rules.RelativeDriftRule if "settled" in self.mechanisms else rules.DriftRule
        return rules.AllRule((drift(self.limits.by_layer("drift")), rules.EntropyRule(self.limits.by_layer("entropy"))))

    @property
    def plan(self) -> Plan:
        """The plan, with the presets' protection."""
        chosen, found, parts = self.mechanisms, self.limits.found, dict[str, Any]()
        halting, kv = dict[str, Any](), dict[str, Any]()
        if self.bits:
            parts["precision"] = rules.PrecisionConfig(self.bits_rule)
        if "shortcuts" in chosen:
            places = [(layer_idx, part) for layer_idx in LAYERS for part in get_args(Part)]
            halting["shortcuts"] = tuple(rules.Shortcut(*place, found[place]) for place in places)
        if chosen & {*HALTING}:
            halting |= {"rule": self.halting_rule, "min_layer": HALTING_LAYERS[0] + 1}
        if "fitted" in chosen:
            halting["output_maps"] = True
        if halting:
            parts["halting"] = rules.HaltingConfig(**halting)
        if "fusion" in chosen:
            parts["fusion"] = rules.FusionConfig(rules.CosineFusionRule(1.0 - found["fusion"]), layers=(2,))
        if "skipping" in chosen:
            kv |= {"skip_below": self.limits.by_layer("skipping"), "estimate_dims_above": self.large}
        if "entries" in chosen:
            kv["bits"] = 8
        return Plan(
            "test",
            kv=rules.KVConfig(self.fill, **kv),
            **parts,
            tensors=PlanTensors(self.tensors) if self.tensors else None,
        )


def whole(layer_idx: int, module: Any, x: Tensor) -> Tensor:
    """Apply a linear map with all its bits."""
    y = rounded(x) @ module.dequantize().T
    return y if module.bias is None else y + module.bias


def run_native(model: Any, plan: Plan, ids: Tensor) -> tuple[Tensor, Trace, RaggedKVCache]:
    """Return the logits [T, vocab] of a prompt and of one token after another, what ran, and the cache."""
    ours = quicksilver.accelerate(model, plan, kernels="native")
    trace, cache, logits = ours.decoder.new_trace(per_token=True), None, []
    for chunk in ids[None].split([PROMPT, *[1] * (LENGTH - PROMPT)], dim=1):
        is_prompt = plan.fusion is not None and cache is None
        output = ours(chunk, past_key_values=cache, trace=trace, prompt=is_prompt, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0])
    assert isinstance(cache, RaggedKVCache)
    return torch.cat(logits), trace, cache


def kept_in(cache: RaggedKVCache) -> oracle.Keep:
    """Return what gives a cache's codes to the oracle, which checks that they are the nearest ones.

    A number in the middle between two codes may be rounded to either, and a step is far more than products are off by.
    """

    def keep(layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        entries, both = cache.entries(layer_idx, 0), []
        for exact, read in ((key, entries.keys), (value, entries.values)):
            kept = oracle.code(exact)
            kept[:, entries.positions] = read.transpose(0, 1)
            steps = exact.abs().amax(-1, keepdim=True) / 127
            assert bool(((kept - exact).abs() <= (0.5 + TIE) * steps).all())
            torch.testing.assert_close(kept, oracle.code(kept))  # they are codes
            both.append(kept)
        return both[0], both[1]

    return keep


def check(family: str, mechanisms: Iterable[str], fill: rules.FillRule) -> Trace:
    """Compare decisions and logits; return what ran."""
    model, ids = tiny.quantized(family), tiny.token_ids(LENGTH, SEED)
    ids[[t for t in PROTECTED if t > 3]] = SPECIAL
    for large in LARGE:
        meaning = Meaning(model, frozenset(mechanisms), fill, large)
        expected = meaning.run(ids)
        if meaning.limits.margin <= MARGIN:
            continue
        logits, trace, cache = run_native(model, meaning.plan, ids)
        if "entries" in meaning.mechanisms:
            expected = meaning.run(ids, kept_in(cache))
        if meaning.limits.margin > MARGIN:
            break
    assert meaning.limits.margin > MARGIN
    layers = trace.layers
    assert torch.equal(torch.cat(trace.depths), expected.depths)
    assert [layer.attended for layer in layers] == expected.attended
    assert [layer.values_skipped for layer in layers] == expected.skipped
    assert [layer.scores_skipped for layer in layers] == expected.unscored
    assert [layer.scored_twice for layer in layers] == expected.again
    assert [{part: layer.shortcut_rows[part] for part in get_args(Part)} for layer in layers] == expected.past
    torch.testing.assert_close(logits, expected.logits, atol=tolerances.UNTIED_LOGITS, rtol=0)
    dense = oracle.run(model, ids, fill, read=whole).logits
    assert float((logits - dense).abs().max()) > 2 * tolerances.UNTIED_LOGITS  # or nothing that was asked for was done
    return trace


@pytest.mark.parametrize("mechanism", [*CALIBRATED, "graded", "uniform", "settled", "drift", "fusion"])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_each_mechanism_alone(family: str, mechanism: str) -> None:
    check(family, {mechanism}, rules.PropagateFill())


@pytest.mark.parametrize("fill", FILLS, ids=lambda fill: type(fill).__name__)
@pytest.mark.parametrize("rule", HALTING)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_halting_under_each_fill(family: str, rule: str, fill: rules.FillRule) -> None:
    assert 2.0 < check(family, {rule}, fill).mean_depth < tiny.NUM_LAYERS


@pytest.mark.parametrize("fill", FILLS, ids=lambda fill: type(fill).__name__)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_all_that_calibrated_presets_hold_together(family: str, fill: rules.FillRule) -> None:
    check(family, CALIBRATED, fill)


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_all_of_it_with_a_fused_prompt(family: str) -> None:
    assert check(family, {*CALIBRATED, "fusion"}, rules.PropagateFill()).group_sizes[2] > 0
