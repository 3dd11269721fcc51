"""Numbers that look random and depend on nothing but a token and where it stands; which rule uses them is its own."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def hashed_uniform(seed: int, layer_idx: int, positions: Tensor, token_ids: Tensor, stream: int = 0) -> Tensor:
    """Return numbers in [0, 1) that depend on (seed, layer, position, token) alone, [N]; each stream has its own.

    Stateless, so prefill, decode and any batching draw the same number for the same token; the token is in it
    so that texts do not all share one pattern. The mixing is the 32-bit finaliser of MurmurHash3 (Austin
    Appleby, public domain), once for each part.
    """
    salt = (seed * 0x9E3779B1 + (layer_idx + 1) * 0x85EBCA77 + stream * 0xC2B2AE3D) & _MASK
    x = _finalise((positions.to(torch.int64) * 0x27D4EB2F + salt) & _MASK)
    x = _finalise(x ^ ((token_ids.to(torch.int64) * 0x165667B1) & _MASK))
    return (x & 0xFFFFFF).to(torch.float32) / float(1 << 24)


def _finalise(x: Tensor) -> Tensor:
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = ((x ^ (x >> shift)) * multiplier) & _MASK
    return x ^ (x >> 16)
