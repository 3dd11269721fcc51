"""Which tokens a mechanism may never touch: the first of a sequence, and special ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quicksilver.rules import FusionConfig, HaltingConfig, PrecisionConfig

_FEW = 16  # tokens that are looked at one by one


class Protection:
    """What a configuration, None for nothing, protects, bound to a model's special tokens."""

    def __init__(
        self,
        config: HaltingConfig | FusionConfig | PrecisionConfig | None,
        special_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self._first = 0 if config is None else config.protect_first
        ids = sorted(set(special_ids)) if config is not None and config.protect_special else []
        self._known = frozenset(ids)
        self._special_ids = torch.tensor(ids, dtype=torch.int64, device=device)

    def covers(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Return which tokens are protected, [N] bool."""
        if _are_few(token_ids):
            return torch.tensor(self._listed(token_ids, positions), dtype=torch.bool)
        protected = positions < self._first
        if self._special_ids.numel():
            protected = protected | torch.isin(token_ids, self._special_ids)
        return protected

    def found(self, token_ids: Tensor, positions: Tensor, waits: bool = False) -> Tensor | None:
        """Return which tokens are protected, [N] bool; None where none is, as far as that is known without waiting.

        `waits`: also where it is known by waiting only: once, and not in every layer.
        """
        if self._first == 0 and not self._known:
            return None
        if _are_few(token_ids):
            listed = self._listed(token_ids, positions)
            return torch.tensor(listed) if any(listed) else None
        covered = self.covers(token_ids, positions)
        return covered if not waits or bool(covered.any()) else None

    def _listed(self, token_ids: Tensor, positions: Tensor) -> list[bool]:
        rows = zip(token_ids.tolist(), positions.tolist(), strict=True)
        return [position < self._first or token in self._known for token, position in rows]


def _are_few(token_ids: Tensor) -> bool:
    """Whether tokens are few, in the host's memory: decoded ones, for which tensor operations are slow."""
    return token_ids.shape[0] <= _FEW and token_ids.device.type == "cpu"
