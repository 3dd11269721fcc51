"""The random control: uniform, repeatable, and free of neighbours, layers and seeds."""

from __future__ import annotations

import pytest
import torch

from quicksilver.core.signals import hashed_uniform

POSITIONS = torch.arange(20_000)
TOKENS = torch.randint(0, 50_000, (20_000,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("seed", "layer_idx"), [(0, 0), (1, 3), (12345, 11)])
def test_uniform(seed: int, layer_idx: int) -> None:
    draws = hashed_uniform(seed, layer_idx, POSITIONS, TOKENS)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = torch.histc(draws, bins=10, min=0.0, max=1.0)
    assert (counts - 2000).abs().max() < 200  # 4.7 standard deviations
    lagged = torch.corrcoef(torch.stack((draws[:-1], draws[1:])))[0, 1]
    assert abs(lagged) < 0.03


def test_layers_and_seeds_draw_independently() -> None:
    base = hashed_uniform(0, 0, POSITIONS, TOKENS)
    for seed, layer_idx in ((0, 1), (1, 0), (7, 5)):
        other = hashed_uniform(seed, layer_idx, POSITIONS, TOKENS)
        assert abs(torch.corrcoef(torch.stack((base, other)))[0, 1]) < 0.03


def test_another_text_halts_elsewhere() -> None:
    """Neither the position nor the token alone decides."""
    base = hashed_uniform(0, 0, POSITIONS, TOKENS)
    for positions, tokens in ((POSITIONS, TOKENS.roll(1)), (POSITIONS.roll(1), TOKENS)):
        assert abs(torch.corrcoef(torch.stack((base, hashed_uniform(0, 0, positions, tokens))))[0, 1]) < 0.03


def test_a_position_draws_the_same_number_in_any_company() -> None:
    whole = hashed_uniform(3, 2, POSITIONS, TOKENS)
    assert torch.equal(whole[100:110], hashed_uniform(3, 2, POSITIONS[100:110], TOKENS[100:110]))
