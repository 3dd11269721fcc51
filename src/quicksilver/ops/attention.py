"""Causal attention of some of a sequence's tokens over its cached entries.

One sequence at a time; who the queries and the entries are is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

AttentionBackend = Literal["sdpa", "eager"]
_BACKENDS = get_args(AttentionBackend)
_BLOCK = 128  # queries whose weights are held at a time, where they must be seen


class Screen(NamedTuple):
    """Scores in two steps: of a query's large components with all keys that it sees, then of the others with fewer.

    In the second step are the keys alone whose score lies at most `log(n / below)` below the largest so far, n the keys
    that the query sees, or is the largest. The others weigh 0, and their values are not read.

    Attributes:
        below: keys are left out below this, in multiples of `1 / n`, of the largest weight known after the first step.
        large_from: magnitude of the components of the first step, in multiples of a query's root mean square.
    """

    below: float
    large_from: float


class Attended(NamedTuple):
    """What attention gives, and what it did: counts are ints where known without asking the device, else scalars.

    Attributes:
        output: [M, num_heads, head_dim] the weighted values.
        pairs: (query, key) pairs scored causally.
        values_skipped: of their (query, key, head) values, those that were not read.
        scores_skipped: multiply-adds of their scores that were left out.
        scored_twice: (query, key, head) scores that took two steps.
        entries: those that are not too old for every query.
    """

    output: Tensor
    pairs: int | Tensor
    values_skipped: int | Tensor
    scores_skipped: int | Tensor
    scored_twice: int | Tensor = 0
    entries: int = 0


class _Queries(NamedTuple):
    """What of queries [M, H, D] meets which keys.

    Attributes:
        kept: their components but for those that are left out.
        large: those of the first step, None where there is one step.
        left_out: [M, H] components left out, None where all stay.
        later: [M, H] components of the second step, None where there is one.
    """

    kept: Tensor
    large: Tensor | None = None
    left_out: Tensor | None = None
    later: Tensor | None = None


def ragged_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    scaling: float,
    newest: bool,
    backend: AttentionBackend = "sdpa",
    masses: Tensor | None = None,
    skip_below: float = 0.0,
    query_below: float = 0.0,
    screen: Screen | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Attended:
    """Attend from each query to the keys at its own and earlier positions, as far back as a window reaches.

    What leaves something out is defined here, not saved: components are set to 0 before the backend runs, values and
    keys are masked out rather than left unread, by plain products whatever the backend. Plain products are made in
    float32 where the dtype is narrower, as within the fused ones: float16 cannot hold every score that is not scaled.

    Args:
        queries: [M, num_heads, head_dim].
        keys: [n, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads.
        values: like keys.
        query_positions: [M] ascending.
        key_positions: [n].
        scaling: factor of the scores.
        newest: the queries are the last M keys, in order, so no positions need comparing.
        backend: "sdpa" (PyTorch's fused attention) or "eager" (plain products; what FLOP counters see).
        masses: [n] tokens that each key stands for: `log(mass)` is added to its scores (Bolya et al. 2022, "Token
            Merging", proportional attention); None where each stands for one.
        skip_below: a head does not read the values that it weighs below `skip_below / n`, n the keys that the query
            sees; the others are scaled to weigh 1. At 0 nothing is skipped.
        query_below: components of a head's query of magnitude below `query_below` times their root mean square are
            left out of its products with the keys. At 0 nothing is.
        screen: makes scores in two steps; None is for one.
        window: a query sees keys at positions above its own less this; None is for all. Whoever counts the keys that a
            query sees, counts these. Older keys may be among those given: those before the first that any query sees
            are not looked at. Where the device must be asked which that is, it is.
        softcap: scores `s` are `softcap * tanh(s / softcap)`, before masses are added; None is for as they are.

    Returns:
        The attended values and the counts.

    Raises:
        ValueError: no such backend.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"attention backend {backend!r} does not exist; there are {', '.join(_BACKENDS)}")
    sees_weights = skip_below > 0.0 or screen is not None
    fused = backend == "sdpa" and not sees_weights and softcap is None
    options = _Options(fused, sees_weights, scaling, skip_below, query_below, screen, window, softcap)
    sequence = _Sequence(queries, keys, values, query_positions, key_positions, masses)
    if window is not None:
        sequence = sequence.within(window)
    if len(queries) <= _BLOCK or not (sees_weights or softcap is not None):
        attended = _attend(sequence, newest, options)
    else:
        blocks = [_attend(block.within(window), newest, options) for block in sequence.blocks(newest)]
        output, *counts = zip(*blocks, strict=True)
        attended = Attended(torch.cat(output), *map(sum, counts))
    return attended._replace(entries=len(sequence.keys))


class _Options(NamedTuple):
    """What is asked of attention, see `ragged_attention`; whether fused kernels will do, whether weights are seen."""

    fused: bool
    sees_weights: bool
    scaling: float
    skip_below: float
    query_below: float
    screen: Screen | None
    window: int | None
    softcap: float | None


class _Sequence(NamedTuple):
    """A sequence's queries and entries; see `ragged_attention`."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    query_positions: Tensor
    key_positions: Tensor
    masses: Tensor | None

    def within(self, window: int | None) -> _Sequence:
        """Return the queries without the first entries, as far as those are too old for all of them."""
        if window is None or len(self.queries) == 0:
            return self
        first = int((self.key_positions > self.query_positions[0] - window).int().argmax())
        masses = None if self.masses is None else self.masses[first:]
        keys, values, positions = self.keys[first:], self.values[first:], self.key_positions[first:]
        return _Sequence(self.queries, keys, values, self.query_positions, positions, masses)

    def blocks(self, newest: bool) -> Iterator[_Sequence]:
        """Yield the queries a few at a time, with all entries or, of the newest, those up to the last of them."""
        before = len(self.keys) - len(self.queries)
        for start in range(0, len(self.queries), _BLOCK):
            rows = slice(start, start + _BLOCK)
            upto = slice(before + start + _BLOCK if newest else None)
            masses = None if self.masses is None else self.masses[upto]
            yield _Sequence(
                self.queries[rows],
                self.keys[upto],
                self.values[upto],
                self.query_positions[rows],
                self.key_positions[upto],
                masses,
            )


def _attend(sequence: _Sequence, newest: bool, options: _Options) -> Attended:
    queries, keys, values, query_positions, key_positions, masses = sequence
    splits = options.query_below > 0.0 or options.screen is not None
    split = _split(queries, options.query_below, options.screen) if splits else _Queries(queries)
    num_queries, num_heads, head_dim = queries.shape
    num_keys, num_kv_heads, _ = keys.shape
    group, dtype = num_heads // num_kv_heads, queries.dtype
    if not options.fused:  # the fused kernels see to it themselves
        dtype = torch.promote_types(dtype, torch.float32)
        keys, values = keys.to(dtype), values.to(dtype)
    # K/V heads are the batch; the heads that share one are its inner heads, or its queries when M is 1.
    key, value = keys.transpose(0, 1).unsqueeze(1), values.transpose(0, 1).unsqueeze(1)  # [Hkv, 1, n, D]
    single = newest and num_queries == 1
    if group > 1 and not single:
        key, value = key.expand(-1, group, -1, -1), value.expand(-1, group, -1, -1)
    query = _arranged(split.kept, num_kv_heads, single, dtype)
    bias = None if masses is None else masses.float().log().to(dtype)[None, :]  # [1, n]
    mask, causal, pairs, seen = _sight(query_positions, key_positions, newest, bias, options.window)
    kept = left = None
    if options.fused:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=options.scaling)
    elif options.sees_weights:
        large = None if split.large is None else _arranged(split.large, num_kv_heads, single, dtype)
        out, kept, left = _skipping(query, key, value, mask, causal, large, options)
    else:
        out = torch.matmul(torch.softmax(_scores(query, key, mask, causal, options), dim=-1), value)
    out = (out if single else out.permute(2, 0, 1, 3)).reshape(num_queries, num_heads, head_dim).to(queries.dtype)
    if left is not None:
        left = (left if single else left.permute(2, 0, 1)).reshape(num_queries, num_heads)
    return Attended(
        out,
        pairs,
        0 if kept is None else pairs * num_heads - kept,
        _scores_skipped(split, seen, left, num_keys) if splits else 0,
        0 if left is None else left.sum(),
    )


def _arranged(rows: Tensor, num_kv_heads: int, single: bool, dtype: torch.dtype) -> Tensor:
    """Return [M, H, D] as [Hkv, 1, G, D] where M is 1, or as [Hkv, G, M, D]."""
    num_rows, num_heads, head_dim = rows.shape
    if single:
        return rows.to(dtype).view(num_kv_heads, 1, num_heads // num_kv_heads, head_dim)
    return rows.to(dtype).view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)


class _Sight(NamedTuple):
    """Which keys queries see.

    Attributes:
        mask: [M, n], or [1, n], what to add to scores, or where keys are seen; None where all are, or `causal`.
        causal: the queries are the keys, each sees those up to itself, and no mask is needed to say so.
        pairs: (query, key) pairs.
        seen: [M] keys that each query sees, None where the last sees all and each before it one less.
    """

    mask: Tensor | None
    causal: bool
    pairs: int | Tensor
    seen: Tensor | None = None


def _sight(
    query_positions: Tensor, key_positions: Tensor, newest: bool, bias: Tensor | None, window: int | None
) -> _Sight:
    """Compare positions, [M] and [n], where they must be; `bias` is [1, n], and no key is too old for every query."""
    num_queries, num_keys = len(query_positions), len(key_positions)
    pairs = num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) // 2
    if newest and num_queries == 1:
        return _Sight(bias, False, pairs)
    if newest and num_queries == num_keys and bias is None and window is None:
        return _Sight(None, True, pairs)
    visible = key_positions[None, :] <= query_positions[:, None]  # [M, n]
    if window is not None:
        visible &= key_positions[None, :] > query_positions[:, None] - window
    mask = visible if bias is None else bias.expand(num_queries, -1).masked_fill(~visible, float("-inf"))
    if newest and window is None:
        return _Sight(mask, False, pairs)
    seen = visible.sum(-1)
    return _Sight(mask, False, seen.sum(), seen)


def _split(queries: Tensor, query_below: float, screen: Screen | None) -> _Queries:
    """Divide the components of queries [M, H, D] by their magnitude."""
    exact = queries.to(torch.promote_types(queries.dtype, torch.float32))
    scale = exact.square().mean(-1, keepdim=True).sqrt()
    small = exact.abs() < query_below * scale
    kept = queries.masked_fill(small, 0.0) if query_below > 0.0 else queries
    left_out = small.sum(-1) if query_below > 0.0 else None
    if screen is None:
        return _Queries(kept, None, left_out)
    later = ~small & (exact.abs() < screen.large_from * scale)
    return _Queries(kept, kept.masked_fill(later, 0.0), left_out, later.sum(-1))


def _scores_skipped(split: _Queries, seen: Tensor | None, left: Tensor | None, num_keys: int) -> int | Tensor:
    """Return the multiply-adds left out: `seen` [M] keys, None for the newest queries'; `left` [M, H] by screening."""
    if seen is None:
        seen = torch.arange(num_keys - len(split.kept) + 1, num_keys + 1, device=split.kept.device)
    skipped: int | Tensor = 0
    if split.left_out is not None:
        skipped = (split.left_out * seen[:, None]).sum()
    if split.later is not None and left is not None:
        skipped = skipped + (split.later * (seen[:, None] - left)).sum()
    return skipped


def _skipping(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    large: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return weighted values, how many of them were kept, and the keys left to each query, None where all were."""
    seen, left = _num_seen(query, key, mask, causal), None  # [M, 1] or [1, 1]
    if large is not None and options.screen is not None:
        first = _scores(large, key, mask, causal, options)  # [Hkv, G, M, n]
        limits = first.amax(-1, keepdim=True) + (options.screen.below / seen).log().clamp(max=0.0)
        screened = first < limits.clamp(min=torch.finfo(limits.dtype).min)  # what is not seen, too
        left = first.shape[-1] - screened.sum(-1)
        bias = None if mask is None or mask.dtype == torch.bool else mask
        scores = _scores(query, key, bias, False, options).masked_fill_(screened, float("-inf"))
    else:
        scores = _scores(query, key, mask, causal, options)
    weights = torch.softmax(scores, dim=-1)
    # Rounded, the largest of equal weights may lie below 1 / n; it is kept all the same.
    weights.masked_fill_(weights < torch.minimum(options.skip_below / seen, weights.amax(-1, keepdim=True)), 0.0)
    output = torch.matmul(weights, value) / weights.sum(-1, keepdim=True)
    return output, weights.count_nonzero(), left


def _num_seen(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return how many keys each query sees, [M, 1] or [1, 1] in the dtype of the query."""
    num_queries, num_keys, dtype = query.shape[-2], key.shape[-2], query.dtype
    if causal:
        return torch.arange(1, num_queries + 1, dtype=dtype, device=query.device)[:, None]
    if mask is None:
        return torch.full((1, 1), num_keys, dtype=dtype, device=query.device)
    seen = mask if mask.dtype == torch.bool else mask > float("-inf")
    return seen.sum(-1, keepdim=True, dtype=dtype)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, options: _Options) -> Tensor:
    """Return the scores, minus infinity where a query does not see a key."""
    scores = torch.matmul(query, key.transpose(-1, -2)).mul_(options.scaling)
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores.add_(mask)
    return scores
