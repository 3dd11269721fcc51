"""The definition of halting, KV fills, coded entries, fusion, shortcuts and skipping: all is computed, masks decide.

Slow and dense on purpose. It shares nothing with the runtime but the rules' pure functions: layers are run
through transformers' own leaf modules, attention is written out, groups are formed token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quicksilver.rules import DropFill, FillRule, FusionWeights, PropagateFill, ZeroFill
from tests.oracle_parts import Layer, Read, parts_of

Halts = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
"""(layer, states before, states after, previous update), each [T, d], to which tokens would halt, [T] bool."""


Alike = Callable[[int, Tensor, int, int], bool]
"""(layer, states [T, d], earlier, later) to whether the two tokens may fuse."""


Bypass = Callable[[int, str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, "attention" or "mlp", its normed input, the state before the norm, each [T, d]) to who goes past it,
[T] bool, and what is added to those instead, [T, d]."""


Compared = Callable[[float], Tensor]
"""From a threshold to all numbers that will be compared with it."""


Limit = float | Callable[[Compared], float]
"""A threshold, or what makes it of what will be compared with it."""


Keep = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, keys, values), each [Hkv, T, D], to those that are kept."""


def whole(layer_idx: int, module: Any, x: Tensor) -> Tensor:
    """Apply a linear map as it is."""
    return module(x)


class Fusion(NamedTuple):
    """After which layers neighbours fuse, in what groups, and what goes on."""

    after_layers: tuple[int, ...]
    max_group: int
    weights: FusionWeights
    alike: Alike


class OracleRun(NamedTuple):
    """What the mechanisms' definitions give.

    Attributes:
        logits: [T, vocab].
        depths: [T] layers run by each token.
        attended: (query, key) pairs scored in each layer.
        skipped: (query, key, head) values left out in each layer.
        unscored: (query component, key) products left out in each layer.
        again: (query, key, head) scores that took both steps in each layer.
        masses: [L, T] tokens that each token stands for when it enters a layer; 0 where it is absorbed.
        sizes: sizes of the groups formed after each layer, ascending.
        past: in each layer, running tokens that went past each sublayer.
    """

    logits: Tensor
    depths: Tensor
    attended: list[int]
    skipped: list[int]
    unscored: list[int]
    again: list[int]
    masses: Tensor
    sizes: list[list[int]]
    past: list[dict[str, int]]


def never(*_: object) -> Tensor:
    """Halt nothing."""
    return torch.tensor(False)


def through(layer_idx: int, part: str, normed: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Let nobody past a sublayer."""
    return torch.zeros(len(normed), dtype=torch.bool), torch.zeros_like(normed)


@torch.no_grad()
def run(
    model: Any,
    ids: Tensor,
    fill: FillRule,
    halts: Halts = never,
    fusion: Fusion | None = None,
    read: Read = whole,
    bypass: Bypass = through,
    skip_below: Sequence[Limit] | None = None,
    estimate_dims_above: Limit = 1.0,
    maps: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    entry_bits: int | None = None,
    keep: Keep | None = None,
) -> OracleRun:
    """Run one sequence [T] and return what the mechanisms' definitions say it gives.

    `skip_below` has, for each layer, the threshold below which keys and values are left out, in multiples of the mean
    weight, and `estimate_dims_above` says which components of a query the first step takes, in multiples of their root
    mean square; `maps` gives, by layer, what is added to the state of a token that stopped there before it predicts;
    `entry_bits` says whether keys and values are kept as whole numbers up to 127 (8) or as bfloat16 (16). Where a
    threshold is a function, it is given all multiples that there are, halted tokens' too.
    `keep` stands in for `entry_bits` where something else says what is kept.
    """
    parts = parts_of(model, ids, read)
    asked = _Asked(fill, halts, fusion, bypass, skip_below, estimate_dims_above, entry_bits, keep)
    tokens, counts = _Tokens.at_first(parts.embedded), _Counts()
    for layer_idx, layer in enumerate(parts.layers):
        is_last = layer_idx == len(parts.layers) - 1
        _run_layer(layer_idx, layer, is_last, tokens, asked, counts)
    hidden, depths = tokens.hidden, tokens.depths
    for layer_idx, added in (maps or {}).items():
        stopped = depths == layer_idx + 1
        hidden = torch.where(stopped[:, None], hidden + added(hidden), hidden)
    logits = parts.logits(hidden)
    return OracleRun(
        logits,
        depths,
        counts.attended,
        counts.skipped,
        counts.unscored,
        counts.again,
        torch.stack(counts.masses),
        counts.sizes,
        counts.past,
    )


class _Asked(NamedTuple):
    """Which mechanisms take part, and how; see `run`."""

    fill: FillRule
    halts: Halts
    fusion: Fusion | None
    bypass: Bypass
    skip_below: Sequence[Limit] | None
    estimate_dims_above: Limit
    entry_bits: int | None
    keep: Keep | None


@dataclass
class _Tokens:
    """A sequence between two layers.

    Attributes:
        hidden: [T, d] states; those of halted tokens stay.
        running: [T] bool.
        masses: [T] tokens that each stands for, 0 where it was absorbed.
        depths: [T] layers run.
        previous_update: [T, d] what the layer before added, None before the second.
    """

    hidden: Tensor
    running: Tensor
    masses: Tensor
    depths: Tensor
    previous_update: Tensor | None = None

    @classmethod
    def at_first(cls, embedded: Tensor) -> _Tokens:
        """Return all of them running, from their embeddings [T, d]."""
        count = len(embedded)
        ones, zeros = torch.ones(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
        return cls(embedded, torch.ones(count, dtype=torch.bool), ones, zeros)


@dataclass
class _Counts:
    """What is counted in each layer; see `OracleRun`."""

    attended: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    unscored: list[int] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    masses: list[Tensor] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)
    past: list[dict[str, int]] = field(default_factory=list)


def _run_layer(layer_idx: int, layer: Layer, is_last: bool, tokens: _Tokens, asked: _Asked, counts: _Counts) -> None:
    """Take a sequence through a layer."""
    hidden, running = tokens.hidden, tokens.running
    query, *own = layer.qkv(hidden)  # [H, T, D], twice [Hkv, T, D]
    listed = running if isinstance(asked.fill, DropFill) else tokens.masses > 0
    mask = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril() & listed[None, :]
    if layer.window is not None:
        mask = mask.triu(1 - layer.window)
    counts.masses.append(tokens.masses)
    past_attention, mapped = asked.bypass(layer_idx, "attention", layer.attn_norm(hidden), hidden)
    asking = running & ~past_attention
    key, value = _filled(asked.fill, tokens, *own)
    added = layer.attn_output(_attend(layer_idx, layer, (query, key, value), mask, asking, tokens, asked, counts))
    after = hidden + torch.where(past_attention[:, None], mapped, added)
    normed = layer.mlp_norm(after)
    past_mlp, mapped = asked.bypass(layer_idx, "mlp", normed, after)
    after = after + torch.where(past_mlp[:, None], mapped, layer.mlp(normed))
    after = torch.where(running[:, None], after, hidden)
    counts.past.append({"attention": int((running & past_attention).sum()), "mlp": int((running & past_mlp).sum())})
    tokens.depths += running
    if not is_last:
        tokens.running = running & ~asked.halts(layer_idx, hidden, after, tokens.previous_update)
    tokens.previous_update = after - hidden
    formed: list[int] = []
    if asked.fusion is not None and layer_idx in asked.fusion.after_layers:
        groups = _fuse(asked.fusion, layer_idx, after, tokens.running, tokens.masses)
        after, tokens.masses, formed = groups
        tokens.running = tokens.running & (tokens.masses > 0)
    counts.sizes.append(sorted(formed))
    tokens.hidden = after


def _filled(fill: FillRule, tokens: _Tokens, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values [Hkv, T, D] of a layer, those of halted tokens as the fill makes them."""
    if isinstance(fill, ZeroFill):
        halted = ~tokens.running & (tokens.masses > 0)
        key, value = key.clone(), value.clone()
        key[:, halted], value[:, halted] = 0.0, 0.0
    else:
        assert isinstance(fill, DropFill | PropagateFill)
    return key, value


def _attend(
    layer_idx: int,
    layer: Layer,
    heads: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    asking: Tensor,
    tokens: _Tokens,
    asked: _Asked,
    counts: _Counts,
) -> Tensor:
    """Return what queries, of heads [H, T, D] and twice [Hkv, T, D], make of the values, [T, H * D]; count it."""
    query, key, value = heads
    counts.attended.append(int(mask[asking].sum()))
    if asked.keep is not None:
        key, value = asked.keep(layer_idx, key, value)
    elif asked.entry_bits is not None:
        key, value = (code(t) if asked.entry_bits == 8 else t.bfloat16().to(t.dtype) for t in (key, value))
    if asked.skip_below is None or asked.skip_below[layer_idx] == 0.0:
        weights, skipped, unscored, again = _weights(query, key, mask, layer, tokens.masses), 0, 0, 0
    else:
        later = _later(query, asked.estimate_dims_above)
        steps = _TwoSteps(query, later, key, mask, layer, tokens.masses)
        weights, left, read = steps.run(asked.skip_below[layer_idx])
        skipped = int((mask & ~read)[:, asking].sum())
        unscored = int((later.sum(-1) * (mask & ~left).sum(-1))[:, asking].sum())
        again = int(left[:, asking].sum())
    counts.skipped.append(skipped)
    counts.unscored.append(unscored)
    counts.again.append(again)
    return _weigh(weights, value)


def _fuse(
    fusion: Fusion, layer_idx: int, hidden: Tensor, running: Tensor, masses: Tensor
) -> tuple[Tensor, Tensor, list[int]]:
    """Form groups token by token; return the new states and masses, and the sizes of the groups."""
    groups: list[list[int]] = []
    for t in running.nonzero().flatten().tolist():
        last = groups[-1][-1] if groups else None
        adjacent = last is not None and last == t - int(masses[t])
        room = bool(groups) and int(masses[groups[-1]].sum() + masses[t]) <= fusion.max_group
        if last is not None and adjacent and room and fusion.alike(layer_idx, hidden, last, t):
            groups[-1].append(t)
        else:
            groups.append([t])
    new_hidden, new_masses, sizes = hidden.clone(), masses.clone(), []
    for group in (group for group in groups if len(group) > 1):
        *absorbed, representative = group
        if fusion.weights == "mass":
            weight = masses[group].float()[:, None]
            new_hidden[representative] = (hidden[group] * weight).sum(0) / weight.sum()
        new_masses[representative] = masses[group].sum()
        new_masses[absorbed] = 0
        sizes.append(int(masses[group].sum()))
    return new_hidden, new_masses, sizes


def code(entries: Tensor) -> Tensor:
    """Return keys or values [Hkv, T, D] as they are kept: whole multiples of a float32, the largest 127 times it.

    There is one for every sixteen dimensions of the first half together with those so far into the second.
    """
    kept = torch.zeros_like(entries)
    half = (entries.shape[-1] + 1) // 2
    for first in range(0, half, 16):
        group = [d for d in range(entries.shape[-1]) if first <= d % half < first + 16]
        for head in range(entries.shape[0]):
            for t in range(entries.shape[1]):
                values = entries[head, t, group]
                scale = float((values.abs().max() / 127).float())
                if scale > 0:
                    kept[head, t, group] = torch.round(values / scale) * scale
    return kept


def _later(query: Tensor, estimate_dims_above: Limit) -> Tensor:
    """Return which components of queries [H, T, D] only the second step takes."""
    root_mean_square = query.norm(dim=-1, keepdim=True) / query.shape[-1] ** 0.5
    if callable(estimate_dims_above):
        estimate_dims_above = estimate_dims_above(lambda _: query.abs() / root_mean_square)
    return query.abs() < estimate_dims_above * root_mean_square


def _weights(query: Tensor, key: Tensor, mask: Tensor, layer: Layer, masses: Tensor) -> Tensor:
    """Return the weights [H, T, T] of queries [H, T, D] over keys [Hkv, T, D], `masses` [T], mask [T, T]."""
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    scores = (query @ key.transpose(1, 2)) * layer.scaling
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = scores + masses.clamp(min=1).float().log()
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a halted token may see nothing; its row is unused


class _TwoSteps(NamedTuple):
    """Attention that leaves out what is estimated, and then what is found, to weigh little."""

    query: Tensor
    later: Tensor
    key: Tensor
    mask: Tensor
    layer: Layer
    masses: Tensor

    def run(self, skip_below: Limit) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights [H, T, T] of the values read, who the second step is of, and whose values are read."""
        if callable(skip_below):
            skip_below = skip_below(self._compared)
        left, found = self._found(skip_below)
        read = _heavy(found, left, self.mask, skip_below)
        weights = torch.where(read, found, 0.0)
        return (weights / weights.sum(-1, keepdim=True)).nan_to_num(0.0), left, read

    def _found(self, skip_below: float) -> tuple[Tensor, Tensor]:
        """Return which keys the first step leaves, and what they weigh among themselves, [H, T, T]."""
        left = _heavy(self._estimated, self.mask.expand_as(self._estimated), self.mask, skip_below)
        return left, _weights(self.query, self.key, left, self.layer, self.masses)

    @property
    def _estimated(self) -> Tensor:
        large = torch.where(self.later, 0.0, self.query)
        return _weights(large, self.key, self.mask, self.layer, self.masses)

    def _compared(self, skip_below: float) -> Tensor:
        """Return all multiples of the mean weight that are compared with a threshold, in either step."""
        both = torch.stack((self._estimated, self._found(skip_below)[1]))
        return both * self.mask.sum(-1, keepdim=True)


def _heavy(weights: Tensor, among: Tensor, mask: Tensor, skip_below: float) -> Tensor:
    """Return which keys `among` some weigh enough, or are the heaviest, [H, T, T]; n counts those that `mask` shows."""
    enough = weights * mask.sum(-1, keepdim=True) >= skip_below
    heaviest = weights == weights.amax(-1, keepdim=True)
    return among & (enough | heaviest)


def _weigh(weights: Tensor, value: Tensor) -> Tensor:
    """Return the values [Hkv, T, D] under the weights [H, T, T], [T, H * D]."""
    value = value.repeat_interleave(len(weights) // len(value), 0)
    return (weights @ value).transpose(0, 1).flatten(1)
