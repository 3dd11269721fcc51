"""Distributions of positive scores as histograms of their logarithm: small, streaming, good for quantiles."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BINS_PER_OCTAVE = 32
_LOWEST, _HIGHEST = -40, 40  # octaves
NUM_BINS = (_HIGHEST - _LOWEST) * _BINS_PER_OCTAVE


def histogram(scores: Tensor) -> Tensor:
    """Return how many scores lie in each bin, [NUM_BINS] int64 on the CPU; zeros lie in the lowest."""
    octaves = torch.log2(scores.double().clamp(min=2.0**_LOWEST)) - _LOWEST
    bins = (octaves * _BINS_PER_OCTAVE).long().clamp(0, NUM_BINS - 1)
    return torch.bincount(bins.flatten(), minlength=NUM_BINS).cpu()


def share_above(counts: Tensor, limit: float) -> float:
    """Return the share of scores at or above a positive limit, each bin's scores spread evenly over it."""
    place = min(max((math.log2(limit) - _LOWEST) * _BINS_PER_OCTAVE, 0.0), float(NUM_BINS))
    full, part = int(place), place - int(place)
    of_bin = float(counts[full]) * (1.0 - part) if full < NUM_BINS else 0.0
    return (float(counts[full + 1 :].sum()) + of_bin) / max(float(counts.sum()), 1.0)


def quantiles(counts: Tensor, shares: Sequence[float]) -> tuple[float, ...]:
    """Return descending limits: the first share of scores is above the first, the second between the first two, ..."""
    below = torch.cat((torch.zeros(1, dtype=torch.float64), counts.double().cumsum(0)))
    limits, above = [], 0.0
    for share in shares[:-1]:
        above += share
        rank = (1.0 - above) * float(below[-1])
        bin_idx = min(max(int(torch.searchsorted(below, rank, right=True)) - 1, 0), NUM_BINS - 1)
        inside = (rank - float(below[bin_idx])) / max(float(counts[bin_idx]), 1.0)
        limits.append(2.0 ** (_LOWEST + (bin_idx + min(max(inside, 0.0), 1.0)) / _BINS_PER_OCTAVE))
    return tuple(limits)
