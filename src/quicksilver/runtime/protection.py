"""Which tokens a mechanism may never touch: the first of a sequence, and special ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quicksilver.core.rules import FusionConfig, HaltingConfig, PrecisionConfig, ShortcutConfig


class Protection:
    """What a configuration protects, bound to a model's special tokens.

    Args:
        config: says how much is protected; None for nothing.
        special_ids: the model's special tokens.
        device: where tokens are.
    """

    def __init__(
        self,
        config: HaltingConfig | FusionConfig | PrecisionConfig | ShortcutConfig | None,
        special_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self._first = 0 if config is None else config.protect_first
        ids = sorted(set(special_ids)) if config is not None and config.protect_special else []
        self._known = frozenset(ids)
        self._special_ids = torch.tensor(ids, dtype=torch.int64, device=device)

    @property
    def is_on(self) -> bool:
        """Whether any token could be protected."""
        return self._first > 0 or self._special_ids.numel() > 0

    def covers(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Return which tokens are protected, [N] bool."""
        if token_ids.shape[0] == 1 and token_ids.device.type == "cpu":  # a decoded token, for which tensors are slow
            return torch.tensor([int(positions) < self._first or int(token_ids) in self._known])
        protected = positions < self._first
        if self._special_ids.numel():
            protected = protected | torch.isin(token_ids, self._special_ids)
        return protected
