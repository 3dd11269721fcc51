"""Attention over a sequence's entries: PyTorch's fused one where it will do, and windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from quicksilver.ops import ragged_attention
from quicksilver.ops.attention import Attended
from tests import tolerances


def test_at_threshold_0_attention_is_pytorchs_fused_one() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(50, 4, 16, generator=generator) for _ in range(3))
    expected = F.scaled_dot_product_attention(
        *(t.transpose(0, 1)[:, None] for t in (query, key, value)), is_causal=True
    )
    got = ragged_attention(query, key, value, torch.arange(50), torch.arange(50), 0.25, newest=True, skip_below=0.0)
    assert torch.equal(got.output, expected[:, 0].transpose(0, 1))
    assert (got.pairs, got.skipped) == (50 * 51 // 2, (0, 0, 0))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"skip_below": 0.4}], ids=str)
@pytest.mark.parametrize("window", [1, 7, 140, 299, 300, 1000])
def test_a_window_is_that_much_of_the_entries(window: int, options: dict[str, Any], backend: Any) -> None:
    """Query by query with the entries that it sees; what is older is never looked at, whatever it holds."""
    generator = torch.Generator().manual_seed(window)
    positions = torch.arange(400)[torch.rand(400, generator=generator) < 0.75]  # some have left nothing
    keys, values = torch.randn(2, len(positions), 2, 8, generator=generator, dtype=torch.float64)
    queries = torch.randn(len(positions), 4, 8, generator=generator, dtype=torch.float64)
    masses = torch.randint(1, 4, (len(positions),), generator=generator)

    def attend(rows: slice, entries: slice, **given: Any) -> Attended:
        of_entries = keys[entries], values[entries], positions[rows], positions[entries], 0.3
        return ragged_attention(
            queries[rows], *of_entries, True, backend, masses=masses[entries], **{**options, **given}
        )

    for first in (0, len(positions) - 5, len(positions) - 1):
        rows = slice(first, None)
        found = attend(rows, slice(None), window=window)
        alone = []
        for t in range(first, len(positions)):
            oldest = int((positions > positions[t] - window).int().argmax())
            alone.append(attend(slice(t, t + 1), slice(oldest, t + 1)))
        wanted = torch.cat([each.output for each in alone])
        torch.testing.assert_close(found.output, wanted, atol=tolerances.LOGITS[torch.float64], rtol=0)
        assert int(found.pairs) == sum(int(each.pairs) for each in alone)
        for count, counts in zip(found.skipped, zip(*(each.skipped for each in alone), strict=True), strict=True):
            assert int(count) == sum(map(int, counts))
        assert found.entries == len(positions) - int((positions > positions[first] - window).int().argmax())
    old = positions <= positions[-1] - window
    keys[old], values[old] = float("nan"), float("nan")
    assert attend(slice(-1, None), slice(None), window=window).output.isfinite().all()
