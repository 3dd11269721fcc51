"""Causal attention of some of a sequence's tokens over its cached entries.

One sequence at a time; who the queries and the entries are is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

AttentionBackend = Literal["sdpa", "eager"]


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
) -> tuple[Tensor, int | Tensor]:
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

    Returns:
        The attended values [M, num_heads, head_dim], and the number of (query, key) pairs scored causally:
        an int where it is known without asking the device, else a scalar tensor.

    Raises:
        ValueError: no such backend.
    """
    attend = _BACKENDS.get(backend)
    if attend is None:
        raise ValueError(f"attention backend {backend!r} does not exist; there are {', '.join(_BACKENDS)}")
    num_queries, num_heads, head_dim = queries.shape
    num_keys, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    # K/V heads are the batch; the heads that share one are its inner heads, or its queries when M is 1.
    key, value = (t.transpose(0, 1).unsqueeze(1) for t in (keys, values))  # [Hkv, 1, n, D]
    bias = None if masses is None else masses.float().log().to(queries.dtype)[None, :]  # [1, n]
    if newest and num_queries == 1:
        out = attend(queries.view(num_kv_heads, 1, group, head_dim), key, value, bias, False, scaling)
        return out.reshape(1, num_heads, head_dim), num_keys
    query = queries.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [Hkv, G, M, D]
    if group > 1:
        key, value = key.expand(-1, group, -1, -1), value.expand(-1, group, -1, -1)
    mask: Tensor | None = None
    pairs: int | Tensor = num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) // 2
    square = newest and num_queries == num_keys and bias is None
    if not square:
        mask = key_positions[None, :] <= query_positions[:, None]  # [M, n]
        if not newest:
            pairs = mask.sum()
        if bias is not None:
            mask = bias.expand(num_queries, -1).masked_fill(~mask, float("-inf"))
    out = attend(query, key, value, mask, square, scaling)
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim), pairs


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling)


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype), value)


_BACKENDS: dict[str, Callable[..., Tensor]] = {"sdpa": _sdpa, "eager": _eager}
