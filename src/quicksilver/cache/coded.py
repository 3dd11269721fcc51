"""Vectors as whole numbers with one scale each, and what those mean; who is kept so is the caller's business."""

import torch
from torch import Tensor

LARGEST_CODE = 127
SCALE_BYTES = 4  # float32


def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [..., D] int8 of rows [..., D] and scales [...] float32: each vector's largest magnitude is 127.

    Rounded to nearest, symmetric about 0. A vector of zeros, or of magnitudes too small for a float32 scale, has scale
    0 and is read back as zeros; one that holds infinity or NaN is read back as NaN.
    """
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scales = (exact.abs().amax(-1) / LARGEST_CODE).float()
    levels = exact / scales.to(exact.dtype).masked_fill(scales == 0, 1.0)[..., None]
    codes = levels.masked_fill(scales[..., None] == 0, 0.0).nan_to_num(0.0).round()
    return codes.clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what codes [..., D] of scales [...] mean, in a dtype."""
    exact = torch.promote_types(dtype, torch.float32)
    return (codes.to(exact) * scales.to(exact)[..., None]).to(dtype)
