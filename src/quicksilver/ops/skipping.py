"""Which keys and values attention leaves out: first what is estimated to weigh little, then what is found to.

All is computed and masked out, which defines the mechanism; what a query sees is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Skipped(NamedTuple):
    """What was left out: ints where nothing was, else scalars on the device."""

    values: int | Tensor = 0  # of the (query, key, head) values, those that were not read
    scores: int | Tensor = 0  # multiply-adds of the scores that were left out
    scored_twice: int | Tensor = 0  # (query, key, head) scores that took both steps


NOTHING = Skipped()


def skip(
    query: Tensor,
    value: Tensor,
    seen: Tensor,
    score: Callable[[Tensor], Tensor],
    below: float,
    estimate_dims_above: float,
) -> tuple[Tensor, Skipped]:
    """Weigh values, without those that weigh below `below / n` of the n that a query sees.

    The first step scores all keys by the large components of the query, and leaves out those whose weight, the softmax
    of these scores, is too small. The second adds the other components for the rest, whose softmax it is over the rest
    alone, leaves out again what weighs too little, and scales what is left to weigh 1. The heaviest always stays.

    Args:
        query: [Hkv, heads, M, D], float32 or wider.
        value: [Hkv, heads, n, D].
        seen: [M, n] or [1, n] bool, the keys that each query sees.
        score: gives the scores [Hkv, heads, M, n] of queries, minus infinity for keys that a query does not see.
        below: at most 1.
        estimate_dims_above: magnitude of large components, in multiples of a query's root mean square.

    Returns:
        The weighted values [Hkv, heads, M, D] and the counts.
    """
    small = query.abs() < estimate_dims_above * query.square().mean(-1, keepdim=True).sqrt()
    estimated = score(query.masked_fill(small, 0.0))
    num_seen = seen.sum(-1, keepdim=True)  # [M, 1]
    least = (below / num_seen.to(query.dtype)).clamp(min=torch.finfo(query.dtype).tiny)
    light = _light(torch.softmax(estimated, dim=-1), least) | ~seen  # weights that are NaN are not below anything
    num_left = light.shape[-1] - light.sum(-1, keepdim=True)
    weights = torch.softmax(score(query).masked_fill_(light, float("-inf")), dim=-1)
    weights.masked_fill_(_light(weights, least) | light, 0.0)
    output = torch.matmul(weights, value) / weights.sum(-1, keepdim=True)
    num_skipped = num_seen - num_left  # [Hkv, heads, M, 1]
    scored_twice = num_left.sum()
    values_skipped = num_skipped.sum() + scored_twice - weights.count_nonzero()
    return output, Skipped(values_skipped, (num_skipped * small.sum(-1, keepdim=True)).sum(), scored_twice)


def _light(weights: Tensor, least: Tensor) -> Tensor:
    """Return which weights [Hkv, heads, M, n] are below `least` [M, 1] and below the largest of a query's."""
    # Rounded, the largest of equal weights may lie below 1 / n; it is kept all the same.
    return weights < torch.minimum(least, weights.amax(-1, keepdim=True))
