"""The definition of halting, KV fills, coded entries, fusion, shortcuts and skipping: all is computed, masks decide.

Slow and dense on purpose. It shares nothing with the runtime but the policies' pure functions: layers are run
through transformers' own leaf modules, attention is written out, groups are formed token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quicksilver.core.rules import DropFill, FusionWeights, KVFill, PropagateFill, ShareFill, ZeroFill
from quicksilver.quant import NestedSplit

Halts = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
"""(layer, states before, states after, previous update), each [T, d], to which tokens would halt, [T] bool."""


Alike = Callable[[int, Tensor, Tensor, int, int], bool]
"""(layer, states [T, d], keys before rotation [T, Hkv, D], earlier, later) to whether the two tokens may fuse."""


Read = Callable[[int, Any, Tensor], Tensor]
"""(layer, a linear map's module, its inputs [T, in]) to its outputs [T, out]."""


Bypass = Callable[[int, str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, "attention" or "mlp", its normed input, the state before the norm, each [T, d]) to who goes past it,
[T] bool, and what is added to those instead, [T, d]."""


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
        again: (query, key, head) scores that took both steps of screening in each layer.
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
    fill: KVFill,
    halts: Halts = never,
    fusion: Fusion | None = None,
    read: Read = whole,
    bypass: Bypass = through,
    skip_below: Sequence[float] | None = None,
    query_below: Sequence[float] | None = None,
    maps: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    entry_bits: int | None = None,
    screen: Sequence[tuple[float, float]] | None = None,
) -> OracleRun:
    """Run one sequence [T] and return what the mechanisms' definitions say it gives.

    `skip_below` has, for each layer, the threshold below which values are skipped, in multiples of the mean weight;
    `query_below` has that of a query's components, in multiples of their root mean square; `maps` gives, by layer, what
    is added to the state of a token that stopped there before it predicts; `entry_bits` says whether keys and values
    are kept as whole numbers up to 127 (8) or as bfloat16 (16); `screen` has, for each layer, the threshold below which
    keys are left out by what the large components of a query say, and from what magnitude on those are large, in the
    same multiples.
    """
    parts = (_gpt2_parts if model.config.model_type == "gpt2" else _llama_parts)(model, ids, read)
    hidden = parts.embedded
    running = torch.ones(len(ids), dtype=torch.bool)
    masses = torch.ones(len(ids), dtype=torch.long)  # 0: absorbed
    shift = torch.zeros_like(hidden)
    depths = torch.zeros(len(ids), dtype=torch.long)
    newest_key = newest_value = previous_update = None
    attended, skipped, unscored, again, all_masses, sizes, past = [], [], [], [], [], [], []
    num_layers = len(parts.layers)
    for layer_idx, layer in enumerate(parts.layers):
        query = layer.qkv(hidden)[0]  # [H, T, D]
        _, key, value = layer.qkv(hidden + shift)  # [Hkv, T, D]
        own_key, own_value = key, value
        halted = ~running & (masses > 0)
        if isinstance(fill, ZeroFill):
            key, value = key.clone(), value.clone()
            key[:, halted], value[:, halted] = 0.0, 0.0
        elif isinstance(fill, ShareFill) and newest_key is not None:
            key = torch.where(running[None, :, None], key, newest_key)
            value = torch.where(running[None, :, None], value, newest_value)
        else:
            assert isinstance(fill, DropFill | PropagateFill | ShareFill)
        listed = running if isinstance(fill, DropFill) else masses > 0
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & listed[None, :]
        all_masses.append(masses)
        past_attention, mapped = bypass(layer_idx, "attention", layer.attn_norm(hidden), hidden)
        asking = running & ~past_attention
        attended.append(int(mask[asking].sum()))
        whole_query = query
        if query_below is not None:
            query, small = _leave_out(query, query_below[layer_idx])
            unscored.append(sum(int(small[:, t].sum() * mask[t].sum()) for t in asking.nonzero().flatten()))
        if entry_bits is not None:
            key, value = (_code(t) if entry_bits == 8 else t.bfloat16().to(t.dtype) for t in (key, value))
        weights = _weights(query, key, mask, layer.scaling, masses)
        if screen is not None and screen[layer_idx][0] > 0:
            later = _leave_out(whole_query, screen[layer_idx][1])[1] & (query != 0)
            first = _weights(torch.where(later, 0.0, query), key, mask, layer.scaling, masses)
            screened = _screened(first, mask, screen[layer_idx][0])
            weights = torch.where(screened, 0.0, weights) / torch.where(screened, 0.0, weights).sum(-1, keepdim=True)
            weights = weights.nan_to_num(0.0)
            unscored[-1] += int((later.sum(-1) * screened.sum(-1))[:, asking].sum())
            again.append(int((mask & ~screened)[:, asking].sum()))
        else:
            screened = torch.zeros_like(weights, dtype=torch.bool)
        if skip_below is not None:
            weights, left_out = _skip(weights, mask, skip_below[layer_idx])
            skipped.append(int((left_out | screened)[:, asking].sum()))
        added = layer.attn_output(_weigh(weights, value))
        after = hidden + torch.where(past_attention[:, None], mapped, added)
        normed = layer.mlp_norm(after)
        past_mlp, mapped = bypass(layer_idx, "mlp", normed, after)
        after = after + torch.where(past_mlp[:, None], mapped, layer.mlp(normed))
        after = torch.where(running[:, None], after, hidden)
        past.append({"attention": int((running & past_attention).sum()), "mlp": int((running & past_mlp).sum())})
        depths += running
        if newest_key is None:
            newest_key, newest_value = own_key, own_value
        newest_key = torch.where(running[None, :, None], own_key, newest_key)
        newest_value = torch.where(running[None, :, None], own_value, newest_value)
        if layer_idx < num_layers - 1:
            running = running & ~halts(layer_idx, hidden, after, previous_update)
        previous_update = after - hidden
        formed: list[int] = []
        if fusion is not None and layer_idx in fusion.after_layers:
            keys = layer.raw_keys(hidden + shift)
            after, shift, masses, formed = _fuse(fusion, layer_idx, after, shift, keys, running, masses)
            running = running & (masses > 0)
        sizes.append(sorted(formed))
        hidden = after
    for layer_idx, added in (maps or {}).items():
        stopped = depths == layer_idx + 1
        hidden = torch.where(stopped[:, None], hidden + added(hidden), hidden)
    logits = model.lm_head(parts.final_norm(hidden))
    return OracleRun(logits, depths, attended, skipped, unscored, again, torch.stack(all_masses), sizes, past)


def _fuse(
    fusion: Fusion, layer_idx: int, hidden: Tensor, shift: Tensor, keys: Tensor, running: Tensor, masses: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Form groups token by token; return the new states, shifts and masses, and the sizes of the groups."""
    groups: list[list[int]] = []
    for t in running.nonzero().flatten().tolist():
        last = groups[-1][-1] if groups else None
        adjacent = last is not None and last == t - int(masses[t])
        room = bool(groups) and int(masses[groups[-1]].sum() + masses[t]) <= fusion.max_group
        if last is not None and adjacent and room and fusion.alike(layer_idx, hidden, keys, last, t):
            groups[-1].append(t)
        else:
            groups.append([t])
    new_hidden, new_shift, new_masses, sizes = hidden.clone(), shift.clone(), masses.clone(), []
    for group in (group for group in groups if len(group) > 1):
        *absorbed, representative = group
        weight = (torch.ones(len(group)) if fusion.weights == "uniform" else masses[group].float())[:, None]
        mean = ((hidden + shift)[group] * weight).sum(0) / weight.sum()
        if fusion.weights in ("mass", "uniform"):
            new_hidden[representative] = mean
        elif fusion.weights == "kv":
            new_shift[representative] = mean - hidden[representative]
        new_masses[representative] = masses[group].sum()
        new_masses[absorbed] = 0
        sizes.append(int(masses[group].sum()))
    return new_hidden, new_shift, new_masses, sizes


def _code(entries: Tensor) -> Tensor:
    """Return keys or values [Hkv, T, D] as they are kept: whole multiples of a float32, the largest 127 times it."""
    kept = torch.zeros_like(entries)
    for head in range(entries.shape[0]):
        for t in range(entries.shape[1]):
            scale = float((entries[head, t].abs().max() / 127).float())
            if scale > 0:
                kept[head, t] = torch.round(entries[head, t] / scale) * scale
    return kept


def _leave_out(query: Tensor, query_below: float) -> tuple[Tensor, Tensor]:
    """Return queries [H, T, D] without their small components, and which of all components those are."""
    small = query.abs() < query_below * query.norm(dim=-1, keepdim=True) / query.shape[-1] ** 0.5
    return torch.where(small, 0.0, query), small


def _weights(query: Tensor, key: Tensor, mask: Tensor, scaling: float, masses: Tensor) -> Tensor:
    """Return the weights [H, T, T] of queries [H, T, D] over keys [Hkv, T, D], `masses` [T], mask [T, T]."""
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    scores = (query @ key.transpose(1, 2)) * scaling + masses.clamp(min=1).float().log()
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a halted token may see nothing; its row is unused


def _screened(weights: Tensor, mask: Tensor, below: float) -> Tensor:
    """Return which of the keys that `mask` shows weigh too little, [H, T, T], by weights of the first step."""
    screened = torch.zeros_like(weights, dtype=torch.bool)
    for t, seen in enumerate(mask):
        for head in range(len(weights)):
            largest = weights[head, t].max()
            screened[head, t] = seen & (weights[head, t] < largest * min(below / int(seen.sum().clamp(min=1)), 1.0))
    return screened


def _skip(weights: Tensor, mask: Tensor, skip_below: float) -> tuple[Tensor, Tensor]:
    """Return the weights [H, T, T] that are left, summing to 1 again, and which of those that `mask` shows are not."""
    left, left_out = torch.zeros_like(weights), torch.zeros_like(weights, dtype=torch.bool)
    for t, seen in enumerate(mask):
        for head in range(len(weights)):
            small = seen & (weights[head, t] * seen.sum() < skip_below)
            read = seen & ~small
            left[head, t, read] = weights[head, t, read] / weights[head, t, read].sum()
            left_out[head, t] = small
    return left, left_out


def _weigh(weights: Tensor, value: Tensor) -> Tensor:
    """Return the values [Hkv, T, D] under the weights [H, T, T], [T, H * D]."""
    value = value.repeat_interleave(len(weights) // len(value), 0)
    return (weights @ value).transpose(0, 1).flatten(1)


class _Layer(NamedTuple):
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    raw_keys: Callable[[Tensor], Tensor]
    attn_norm: Callable[[Tensor], Tensor]
    attn_output: Callable[[Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    scaling: float


class _Parts(NamedTuple):
    embedded: Tensor
    layers: list[_Layer]
    final_norm: Callable[[Tensor], Tensor]


def _gpt2_parts(model: Any, ids: Tensor, read: Read) -> _Parts:
    body = model.transformer

    def layer(layer_idx: int, block: Any) -> _Layer:
        apply = partial(read, layer_idx)

        def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            c_attn, normed = block.attn.c_attn, block.ln_1(x)
            if isinstance(c_attn, NestedSplit):
                parts = [apply(part, normed) for part in c_attn.parts]
            else:
                parts = c_attn(normed).split(block.attn.split_size, dim=1)
            query, key, value = (
                p.view(len(x), block.attn.num_heads, block.attn.head_dim).transpose(0, 1) for p in parts
            )
            return query, key, value

        def mlp(normed: Tensor) -> Tensor:
            return apply(block.mlp.c_proj, block.mlp.act(apply(block.mlp.c_fc, normed)))

        def raw_keys(x: Tensor) -> Tensor:
            return qkv(x)[1].transpose(0, 1)

        output = partial(apply, block.attn.c_proj)
        return _Layer(qkv, raw_keys, block.ln_1, output, block.ln_2, mlp, block.attn.scaling)

    embedded = body.wte(ids) + body.wpe(torch.arange(len(ids)))
    return _Parts(embedded, [layer(i, block) for i, block in enumerate(body.h)], body.ln_f)


def _llama_parts(model: Any, ids: Tensor, read: Read) -> _Parts:
    body = model.model
    embedded = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(embedded[None], torch.arange(len(ids))[None])

    def layer(layer_idx: int, block: Any) -> _Layer:
        attention, apply = block.self_attn, partial(read, layer_idx)

        def heads(x: Tensor, norm: Any = None) -> Tensor:
            x = x.view(len(x), -1, attention.head_dim)
            return (x if norm is None else norm(x)).transpose(0, 1)

        def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = block.input_layernorm(x)
            query = heads(apply(attention.q_proj, x), getattr(attention, "q_norm", None))
            query, key = apply_rotary_pos_emb(query[None], unrotated(x)[None], cos, sin)
            return query[0], key[0], heads(apply(attention.v_proj, x))

        def unrotated(x: Tensor) -> Tensor:
            return heads(apply(attention.k_proj, x), getattr(attention, "k_norm", None))

        def raw_keys(x: Tensor) -> Tensor:
            return unrotated(block.input_layernorm(x)).transpose(0, 1)

        def mlp(normed: Tensor) -> Tensor:
            gated = block.mlp.act_fn(apply(block.mlp.gate_proj, normed)) * apply(block.mlp.up_proj, normed)
            return apply(block.mlp.down_proj, gated)

        norms, output = (block.input_layernorm, block.post_attention_layernorm), partial(apply, attention.o_proj)
        return _Layer(qkv, raw_keys, norms[0], output, norms[1], mlp, attention.scaling)

    return _Parts(embedded, [layer(i, block) for i, block in enumerate(body.layers)], body.norm)
