"""How far an engine's logits are from the float model's, and how far they may be before anything is timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_ROWS = 16  # taken at a time, in float64


@dataclass(frozen=True)
class Quality:
    """Logits of the same tokens compared, the float model's first.

    Attributes:
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        relative: root mean square of the difference / standard deviation of the float model's logits of a token.
        kl: mean over tokens of KL(float || engine), nats.
        top1_agreement: share of tokens whose most likely next token is the same.
        tokens: compared.
    """

    max_abs: float
    mean_abs: float
    relative: float
    kl: float
    top1_agreement: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values."""
        return asdict(self)


def compare(reference: np.ndarray, logits: np.ndarray) -> Quality:
    """Compare logits [T, vocab] with the float model's.

    Raises:
        ValueError: they are of another shape.
    """
    if reference.shape != logits.shape:
        raise ValueError(f"logits of shape {logits.shape}, the float model's are {reference.shape}")
    largest = absolute = squared = spread = divergence = 0.0
    agreed = 0
    for start in range(0, len(reference), _ROWS):
        theirs, ours = (each[start : start + _ROWS].astype(np.float64) for each in (reference, logits))
        difference = np.abs(theirs - ours)
        largest = max(largest, float(difference.max())) if np.isfinite(difference).all() else float("inf")
        absolute += float(difference.sum())
        squared += float(np.square(difference).sum())
        spread += float(np.square(theirs - theirs.mean(1, keepdims=True)).sum())
        log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
        divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
        agreed += int((theirs.argmax(1) == ours.argmax(1)).sum())
    tokens = len(reference)
    relative = float(np.sqrt(squared / max(spread, 1e-30)))
    return Quality(largest, absolute / reference.size, relative, divergence / tokens, agreed / tokens, tokens)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
