"""What is protected, however few or many the tokens are."""

from __future__ import annotations

import pytest
import torch

from quicksilver.rules import HaltingConfig, RandomRule
from quicksilver.runtime.protection import Protection

CPU = torch.device("cpu")


def protection(first: int, special: bool) -> Protection:
    config = HaltingConfig(RandomRule(0.5), protect_first=first, protect_special=special)
    return Protection(config, (3, 9), CPU)


@pytest.mark.parametrize("count", [0, 1, 5, 16, 17, 40])
@pytest.mark.parametrize(("first", "special"), [(0, True), (2, True), (4, False), (0, False)])
def test_first_and_special_tokens_are(count: int, first: int, special: bool) -> None:
    held, token_ids = protection(first, special), torch.arange(count) % 12
    for start in (0, 1, 50):
        positions = torch.arange(start, start + count)
        rows = zip(token_ids.tolist(), positions.tolist(), strict=True)
        expected = [position < first or (special and token in (3, 9)) for token, position in rows]
        covered = held.covers(token_ids, positions)
        assert covered.dtype == torch.bool
        assert covered.tolist() == expected
        found = held.found(token_ids, positions)
        assert (found is None and not any(expected)) or (found is not None and found.tolist() == expected)
        if count <= 16 and not any(expected):
            assert found is None
