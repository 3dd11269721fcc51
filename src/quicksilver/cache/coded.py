"""Vectors as whole numbers, and what those mean; who is kept so is the caller's business.

Dimensions i and i + D/2 of a vector share a scale with their neighbours: rotations turn such pairs, so that what is
large in one half comes to be large in the other, and some pairs are far larger than the rest.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_CODE = 127
SCALE_BYTES = 4  # float32
_PAIRS = 16  # that share a scale


def num_scales(head_dim: int) -> int:
    """Return how many scales a vector of so many dimensions has."""
    return -(-((head_dim + 1) // 2) // _PAIRS)


def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [..., D] int8 of rows [..., D] and scales [..., S] float32: each group's largest magnitude is 127.

    Group s holds dimensions [16 s, 16 s + 16) of either half of a vector. Codes are rounded to nearest, symmetric about
    0. A group of zeros, or of magnitudes too small for a float32 scale, has scale 0 and is read back as zeros; one that
    holds infinity or NaN is read back as NaN.
    """
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scales = (_grouped(exact).abs().amax((-3, -1)) / LARGEST_CODE).float()
    of_dims = _spread(scales, rows.shape[-1])
    levels = exact / of_dims.to(exact.dtype).masked_fill(of_dims == 0, 1.0)
    codes = levels.masked_fill(of_dims == 0, 0.0).nan_to_num(0.0).round()
    return codes.clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what codes [..., D] of scales [..., S] mean, in a dtype."""
    exact = torch.promote_types(dtype, torch.float32)
    return (codes.to(exact) * _spread(scales.to(exact), codes.shape[-1])).to(dtype)


def _grouped(rows: Tensor) -> Tensor:
    """Return rows [..., D] as halves of groups [..., 2, S, 16], with zeros where a half ends."""
    size = rows.shape[-1]
    half = (size + 1) // 2
    halves = F.pad(rows, (0, 2 * half - size)).unflatten(-1, (2, half))
    return F.pad(halves, (0, _PAIRS * num_scales(size) - half)).unflatten(-1, (-1, _PAIRS))


def _spread(scales: Tensor, size: int) -> Tensor:
    """Return the scales [..., S] of each of `size` dimensions."""
    half = scales.repeat_interleave(_PAIRS, -1)[..., : (size + 1) // 2]
    return torch.cat((half, half), dim=-1)[..., :size]
