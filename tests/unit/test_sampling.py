"""Choosing a token: shortcuts give what transformers and PyTorch give, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper

from quicksilver.errors import InputError
from quicksilver.runtime import nucleus, sampling
from quicksilver.runtime.nucleus import NucleusWarper
from quicksilver.runtime.processors import warpers, without
from quicksilver.runtime.sampling import Draw, drawn, keyed_uniform, likeliest
from quicksilver.runtime.settings import Settings

IDS = torch.zeros((1, 1), dtype=torch.int64)


def scores_of(rows: int, vocab: int, spread: float, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("vocab", [1, 2, 50, 3000, 50_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 40.0])
def test_the_nucleus_is_that_of_transformers(vocab: int, spread: float) -> None:
    for seed, share in enumerate((0.0, 1e-6, 0.3, 0.9, 0.99, 1 - 1e-6)):
        for rows in (1, 3):
            scores = scores_of(rows, vocab, spread, seed)
            for given in (scores, scores.mul(4).round(), TopKLogitsWarper(20)(IDS, scores)):  # type: ignore[arg-type]
                expected = TopPLogitsWarper(share)(IDS, given)  # type: ignore[arg-type]
                assert torch.equal(NucleusWarper(share)(IDS, given), expected)


def test_a_nucleus_is_found_without_a_sort_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    likely = nucleus._likely
    monkeypatch.setattr(nucleus, "_likely", lambda *given: sizes.append(len(found := likely(*given))) or found)
    monkeypatch.setattr(TopPLogitsWarper, "__call__", lambda *_: pytest.fail("the whole vocabulary was sorted"))
    for spread in (3.5, 6.0, 40.0):  # the last leaves one token
        for seed in range(5):
            NucleusWarper(0.9)(IDS, scores_of(1, 50_000, spread, seed))
    assert len(sizes) == 15
    assert max(sizes) < 4000


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_nucleus_of_odd_scores_is_that_of_transformers(odd: float) -> None:
    for places in (slice(7, 8), slice(None)):
        scores = scores_of(2, 300, 3.0)
        scores[:, places] = odd
        expected = TopPLogitsWarper(0.9)(IDS, scores)  # type: ignore[arg-type]
        torch.testing.assert_close(NucleusWarper(0.9)(IDS, scores), expected, rtol=0, atol=0, equal_nan=True)
    for dtype in (torch.float64, torch.bfloat16):
        scores = scores_of(1, 300, 3.0).to(dtype)
        assert torch.equal(NucleusWarper(0.9)(IDS, scores), TopPLogitsWarper(0.9)(IDS, scores))  # type: ignore[arg-type]


def test_a_callers_top_p_stands_in_for_that_of_the_settings() -> None:
    settings, _ = Settings.resolve(None, GenerationConfig(), {"do_sample": True, "top_p": 0.5, "top_k": 0})
    made = warpers(settings, 300, torch.device("cpu"))
    assert [type(each) for each in made] == [NucleusWarper]
    assert without(made, [TopPLogitsWarper(0.2)]) == []
    assert without(made, [TopKLogitsWarper(2)]) == made


@pytest.mark.parametrize("vocab", [1, 7, 300, 50_000])
def test_a_draw_is_that_of_multinomial_and_leaves_the_generator_alike(vocab: int) -> None:
    for seed in range(20):
        shares = scores_of(1 + seed % 3, vocab, 3.0, seed).softmax(-1)
        torch.manual_seed(seed)
        expected, state = torch.multinomial(shares, 1).squeeze(1), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(drawn(shares), expected)
        assert torch.equal(torch.get_rng_state(), state)


def test_draws_are_multinomials_own_where_pytorch_makes_its_random_numbers_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares, asked = scores_of(2, 300, 3.0).softmax(-1), []
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *given: asked.append(given) or multinomial(*given))
    drawn(shares)
    if sampling._waits_are_of_uniforms():
        assert not asked
    monkeypatch.setattr(sampling, "_waits_are_of_uniforms", lambda: False)
    drawn(shares)
    drawn(shares.double())
    assert len(asked) >= 2


@pytest.mark.parametrize("shares", [torch.full((2, 5), torch.nan), torch.zeros(2, 5)], ids=["NaN", "zero"])
def test_shares_that_are_none_are_refused_as_before(shares: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"probability tensor|multinomial distribution"):
        drawn(shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_likeliest_is_the_first_of_several_as_in_pytorch(dtype: torch.dtype) -> None:
    for vocab in (1, 7, 300, 40_000):
        scores = scores_of(3, vocab, 2.0).round().to(dtype)
        scores[1] = -torch.inf
        scores[2, vocab // 2 :] = torch.nan
        assert torch.equal(likeliest(scores), scores.argmax(-1))
        assert torch.equal(Draw(False)(scores[:1], [0]), scores[:1].argmax(-1))


def test_keyed_draws_are_what_they_were() -> None:
    """Tokens of a seed do not change from release to release."""
    scores = scores_of(4, 300, 3.0)
    draw = Draw(True, [(11, 0), (11, 1), (5, 0), (2**64 - 1, 0)])
    tokens = [draw(scores, [place] * 4).tolist() for place in (0, 9, 100)]
    assert tokens == [[59, 93, 264, 41], [59, 37, 57, 9], [59, 37, 165, 9]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keyed_draws_are_by_the_softmax_of_what_is_not_removed(dtype: torch.dtype) -> None:
    """Computed over all scores in float64, removed ones included."""
    for seed in range(40):
        scores = scores_of(1, 300, 3.0, seed).to(dtype)
        scores[scores < scores.topk(1 + seed % 6 * 50).values[:, -1:]] = -torch.inf
        ends = scores.double().softmax(-1).cumsum(-1)
        wanted = keyed_uniform(seed, 0, 5) * ends[:, -1:]
        expected = torch.searchsorted(ends, wanted, right=True).squeeze(1)
        assert torch.equal(Draw(True, [(seed, 0)])(scores, [5]), expected)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_keyed_draw_from_odd_scores_is_refused(odd: float) -> None:
    scores = torch.full((2, 9), odd)
    for given in (scores, scores.where(torch.arange(9) > 3, 1.0)) if odd != -torch.inf else (scores,):
        with pytest.raises(InputError, match="no token can be drawn"):
            Draw(True, [(0, 0), (0, 1)])(given, [0, 0])
