"""Top-p as transformers defines it, for the same bits, without a sort of the whole vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from quicksilver.runtime.sampling import Floats

Places = np.ndarray[Any, np.dtype[np.intp]]

_FEWER = 0.75  # of the tokens looked at: as long as so few remain, looking again takes less time than sorting them
_ROUNDING = 2.0**-18  # relative: eight times what float32 was seen to make of transformers' sums of sorted shares


class NucleusWarper(TopPLogitsWarper):
    """Sorts those tokens alone that may be kept; asks transformers' own class where rounding could decide otherwise.

    A token is removed where it and all less likely ones weigh at most 1 - p.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [B, vocab], those of removed tokens replaced."""
        if scores.device.type == "cpu" and scores.dtype == torch.float32:
            rows = [self._kept(shares) for shares in scores.softmax(-1).numpy()]
            if all(kept is not None for kept in rows):
                left = torch.full_like(scores, self.filter_value)
                for into, row, kept in zip(left.numpy(), scores.numpy(), rows, strict=True):
                    into[kept] = row[kept]
                return left
        return super().__call__(input_ids, scores)  # type: ignore[arg-type]

    def _kept(self, shares: Floats) -> Places | None:
        """Return the tokens to keep, [n], given shares [vocab]; None where transformers must say."""
        total = _weight(shares)  # not 1: a float32 sum of unsorted numbers is less exact than transformers' sorted one
        removable = (1.0 - self.top_p) * total
        tokens = _likely(shares, total, removable)
        if tokens is None:
            return None
        ascending = shares[tokens].argsort(kind="stable")
        tokens = tokens[ascending]
        shares = shares[tokens]
        others = total - _weight(shares)  # what the tokens that are not among these weigh
        weights = shares.cumsum(dtype=np.float64) + others
        first = int(weights.searchsorted(removable, side="right"))  # of those that are kept
        if first > len(tokens) - self.min_tokens_to_keep:
            return None
        edge = (others if first == 0 else weights[first - 1]), weights[first]  # around the first
        is_near = any(abs(weight - removable) <= _ROUNDING * removable for weight in edge)
        is_tie = first > 0 and shares[first - 1] == shares[first]
        return None if is_near or is_tie else tokens[first:]


def _likely(shares: Floats, total: float, removable: float) -> Places | None:
    """Return tokens, ascending, without many of those that go for sure, given shares [vocab]; None where few do."""
    tokens, weight = None, total  # of those looked at
    while True:
        # Even if all of these had this share, they would weigh no more than may still go.
        found = np.flatnonzero(shares > (removable - total + weight) / len(shares))
        if not 0 < len(found) < _FEWER * len(shares):
            return tokens
        shares = shares[found]
        tokens, weight = found if tokens is None else tokens[found], _weight(shares)


def _weight(shares: Floats) -> float:
    return float(shares.sum(dtype=np.float64))
