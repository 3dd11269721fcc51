"""Causal attention of some of a sequence's tokens over its cached entries.

One sequence at a time; who the queries and the entries are is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.ops.skipping import NOTHING, Skipped, skip

AttentionBackend = Literal["sdpa", "eager"]
_BACKENDS = get_args(AttentionBackend)
_BLOCK = 128  # queries whose weights are held at a time, where they must be seen


class Attended(NamedTuple):
    """What attention gives, and what it did: counts are ints where known without asking the device, else scalars."""

    output: Tensor  # [M, num_heads, head_dim] the weighted values
    pairs: int | Tensor  # (query, key) pairs scored causally
    skipped: Skipped = NOTHING  # what of them was left out
    entries: int = 0  # those that are not too old for every query


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
    estimate_dims_above: float = 1.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Attended:
    """Attend from each query to the keys at its own and earlier positions, as far back as a window reaches.

    What is skipped is masked out rather than left unread, by plain products whatever the backend. Plain products are
    made in float32 where the dtype is narrower, as within the fused ones: float16 cannot hold every score that is not
    scaled.

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
        skip_below: keys and values that weigh below `skip_below / n`, n the keys that the query sees, are left out as
            `skipping.skip` says. At 0 nothing is.
        estimate_dims_above: see there.
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
    fused = backend == "sdpa" and skip_below == 0.0 and softcap is None
    options = _Options(fused, scaling, skip_below, estimate_dims_above, window, softcap)
    sequence = _Sequence(queries, keys, values, query_positions, key_positions, masses)
    if window is not None:
        sequence = sequence.within(window)
    if len(queries) <= _BLOCK or (skip_below == 0.0 and softcap is None):
        attended = _attend(sequence, newest, options)
    else:
        blocks = [_attend(block.within(window), newest, options) for block in sequence.blocks(newest)]
        output, pairs, skipped, _ = zip(*blocks, strict=True)
        attended = Attended(torch.cat(output), sum(pairs), Skipped(*map(sum, zip(*skipped, strict=True))))
    return attended._replace(entries=len(sequence.keys))


class _Options(NamedTuple):
    """What is asked of attention, see `ragged_attention`; whether fused kernels will do."""

    fused: bool
    scaling: float
    skip_below: float
    estimate_dims_above: float
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
    num_queries, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    group, dtype = num_heads // num_kv_heads, queries.dtype
    if not options.fused:  # the fused kernels see to it themselves
        dtype = torch.promote_types(dtype, torch.float32)
        keys, values = keys.to(dtype), values.to(dtype)
    # K/V heads are the batch; the heads that share one are its inner heads, or its queries when M is 1.
    key, value = keys.transpose(0, 1).unsqueeze(1), values.transpose(0, 1).unsqueeze(1)  # [Hkv, 1, n, D]
    single = newest and num_queries == 1
    if group > 1 and not single:
        key, value = key.expand(-1, group, -1, -1), value.expand(-1, group, -1, -1)
    query = queries.to(dtype)
    if single:
        query = query.view(num_kv_heads, 1, group, head_dim)
    else:
        query = query.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    bias = None if masses is None else masses.float().log().to(dtype)[None, :]  # [1, n]
    mask, causal, pairs = _sight(query_positions, key_positions, newest, bias, options.window)
    skipped = NOTHING
    if options.fused:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=options.scaling)
    elif options.skip_below > 0.0:
        score = partial(_scores, key=key, mask=mask, causal=causal, options=options)
        seen = _seen(mask, causal, query.shape[-2], key.shape[-2], query.device)
        out, skipped = skip(query, value, seen, score, options.skip_below, options.estimate_dims_above)
    else:
        out = torch.matmul(torch.softmax(_scores(query, key, mask, causal, options), dim=-1), value)
    out = (out if single else out.permute(2, 0, 1, 3)).reshape(num_queries, num_heads, head_dim).to(queries.dtype)
    return Attended(out, pairs, skipped)


class _Sight(NamedTuple):
    """Which keys queries see."""

    # [M, n], or [1, n], what to add to scores, or where keys are seen; None where all are, or `causal`
    mask: Tensor | None
    causal: bool  # the queries are the keys, each sees those up to itself, and no mask is needed to say so
    pairs: int | Tensor  # (query, key) pairs


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
    return _Sight(mask, False, visible.sum())


def _seen(mask: Tensor | None, causal: bool, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return which keys each query sees, [M, n] or [1, n] bool."""
    if mask is not None:
        return mask if mask.dtype == torch.bool else mask > float("-inf")
    seen = torch.ones((num_queries if causal else 1, num_keys), dtype=torch.bool, device=device)
    return seen.tril() if causal else seen


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, options: _Options) -> Tensor:
    """Return the scores, minus infinity where a query does not see a key."""
    scores = torch.matmul(query, key.transpose(-1, -2)).mul_(options.scaling)
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
    if causal:
        mask = _seen(None, True, scores.shape[-2], scores.shape[-1], scores.device)
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores.add_(mask)
    return scores
