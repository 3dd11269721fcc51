"""Causal attention of some of a sequence's tokens over its cached entries.

One sequence at a time; who the queries and the entries are is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

AttentionBackend = Literal["sdpa", "eager"]
_Result = tuple[Tensor, Tensor | None]
"""Weighted values, and how many of the (query, key, head) values were kept, None where all were."""


class Attended(NamedTuple):
    """What attention gives, and what it did: counts are ints where known without asking the device, else scalars.

    Attributes:
        output: [M, num_heads, head_dim] the weighted values.
        pairs: (query, key) pairs scored causally.
        values_skipped: of their (query, key, head) values, those that were not read.
        scores_skipped: multiply-adds of their scores that were left out.
    """

    output: Tensor
    pairs: int | Tensor
    values_skipped: int | Tensor
    scores_skipped: int | Tensor


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
) -> Attended:
    """Attend from each query to the keys at its own and earlier positions.

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
            sees; the others are scaled to weigh 1. At 0 nothing is skipped; above, the products are plain whatever
            the backend, and values are masked out rather than left unread: this is the definition, not a saving.
        query_below: components of a head's query of magnitude below `query_below` times their root mean square are
            left out of its products with the keys. At 0 nothing is; above, they are set to 0 before the backend runs:
            this too is the definition. A kernel that saves would not read those components of the keys.

    Returns:
        The attended values and the counts.

    Raises:
        ValueError: no such backend.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"attention backend {backend!r} does not exist; there are {', '.join(_BACKENDS)}")
    attend = partial(_skipping, skip_below=skip_below) if skip_below > 0.0 else _BACKENDS[backend]
    queries, left_out = _large(queries, query_below)
    num_queries, num_heads, head_dim = queries.shape
    num_keys, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    # K/V heads are the batch; the heads that share one are its inner heads, or its queries when M is 1.
    key, value = (t.transpose(0, 1).unsqueeze(1) for t in (keys, values))  # [Hkv, 1, n, D]
    bias = None if masses is None else masses.float().log().to(queries.dtype)[None, :]  # [1, n]
    if newest and num_queries == 1:
        out, kept = attend(queries.view(num_kv_heads, 1, group, head_dim), key, value, bias, False, scaling)
        out, skipped = out.reshape(1, num_heads, head_dim), _skipped(num_keys * num_heads, kept)
        return Attended(out, num_keys, skipped, _scores_skipped(left_out, None, num_keys))
    query = queries.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [Hkv, G, M, D]
    if group > 1:
        key, value = key.expand(-1, group, -1, -1), value.expand(-1, group, -1, -1)
    mask = seen = None
    pairs: int | Tensor = num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) // 2
    square = newest and num_queries == num_keys and bias is None
    if not square:
        mask = key_positions[None, :] <= query_positions[:, None]  # [M, n]
        if not newest:
            seen = mask.sum(-1)
            pairs = seen.sum()
        if bias is not None:
            mask = bias.expand(num_queries, -1).masked_fill(~mask, float("-inf"))
    out, kept = attend(query, key, value, mask, square, scaling)
    out = out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
    return Attended(out, pairs, _skipped(pairs * num_heads, kept), _scores_skipped(left_out, seen, num_keys))


def _large(queries: Tensor, query_below: float) -> tuple[Tensor, Tensor | None]:
    """Return queries [M, H, D] without their small components, and how many those are, [M]; None where all stay."""
    if query_below == 0.0:
        return queries, None
    exact = queries.to(torch.promote_types(queries.dtype, torch.float32))
    small = exact.abs() < query_below * exact.square().mean(-1, keepdim=True).sqrt()
    return queries.masked_fill(small, 0.0), small.sum((1, 2))


def _scores_skipped(left_out: Tensor | None, seen: Tensor | None, num_keys: int) -> int | Tensor:
    """Return components left out, [M], times keys seen, [M]; None is for the newest, who see all up to themselves."""
    if left_out is None:
        return 0
    if seen is None:
        seen = torch.arange(num_keys - len(left_out) + 1, num_keys + 1, device=left_out.device)
    return (left_out * seen).sum()


def _skipped(values: int | Tensor, kept: Tensor | None) -> int | Tensor:
    return 0 if kept is None else values - kept


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> _Result:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling), None


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> _Result:
    weights = _softmax(_scores(query, key, mask, causal, scaling))
    return torch.matmul(weights.to(value.dtype), value), None


def _skipping(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    skip_below: float,
) -> _Result:
    weights = _softmax(_scores(query, key, mask, causal, scaling))  # [Hkv, G, M, n]
    limits = skip_below / _num_seen(weights, mask, causal)
    # Rounded, the largest of equal weights may lie below 1 / n; it is kept all the same.
    weights.masked_fill_(weights < torch.minimum(limits, weights.amax(-1, keepdim=True)), 0.0)
    output = torch.matmul(weights.to(value.dtype), value) / weights.sum(-1, keepdim=True).to(value.dtype)
    return output, weights.count_nonzero()


def _num_seen(weights: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return how many keys each query sees, [M, 1] or [1, 1] in the weights' dtype."""
    num_queries, num_keys = weights.shape[-2:]
    if causal:
        return torch.arange(1, num_queries + 1, dtype=weights.dtype, device=weights.device)[:, None]
    if mask is None:
        return torch.full((1, 1), num_keys, dtype=weights.dtype, device=weights.device)
    seen = mask if mask.dtype == torch.bool else mask > float("-inf")
    return seen.sum(-1, keepdim=True, dtype=weights.dtype)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Tensor:
    """Return the scores, minus infinity where a query does not see a key."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores


def _softmax(scores: Tensor) -> Tensor:
    """Return the weights, in float32 at least."""
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


_BACKENDS: dict[str, Callable[..., _Result]] = {"sdpa": _sdpa, "eager": _eager}
