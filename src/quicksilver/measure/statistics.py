"""Paired statistics over windows; no model, no tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
SEED = 0


_LARGEST_NLL = 700.0  # exp of more is no float


def perplexity(nll: float) -> float:
    """Return exp(nll), capped near the largest float."""
    return float(_perplexities(np.asarray(nll)))


def _perplexities(nll: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(nll, _LARGEST_NLL))


@dataclass(frozen=True)
class PairedDelta:
    """Differences plan - dense, with 95 % percentile intervals of a paired bootstrap over windows; None for one."""

    ppl: float
    ppl_ci95: tuple[float, float] | None
    nll: float
    nll_ci95: tuple[float, float] | None


def paired_delta(dense_nll: Sequence[float], plan_nll: Sequence[float], tokens: Sequence[int]) -> PairedDelta:
    """Compare two runs over the same windows by each window's total nats and the tokens scored in it."""
    dense, plan, counts = (np.asarray(values, dtype=np.float64) for values in (dense_nll, plan_nll, tokens))
    dense_all, plan_all = dense.sum() / counts.sum(), plan.sum() / counts.sum()
    ppl, nll = perplexity(plan_all) - perplexity(dense_all), float(plan_all - dense_all)
    if len(counts) < 2:
        return PairedDelta(ppl, None, nll, None)
    draws = np.random.default_rng(SEED).integers(0, len(counts), size=(RESAMPLES, len(counts)))
    totals = counts[draws].sum(1)
    dense_mean, plan_mean = dense[draws].sum(1) / totals, plan[draws].sum(1) / totals
    ppl_ci95 = _interval(_perplexities(plan_mean) - _perplexities(dense_mean))
    return PairedDelta(ppl, ppl_ci95, nll, _interval(plan_mean - dense_mean))


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(low), float(high)
