"""Our decoding loop gives the tokens and the counts of transformers' own, `GenerationMixin._sample`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

import quicksilver
from quicksilver.core.plan import Plan
from quicksilver.core.rules import EntropyRule, PropagateFill, RandomFusionRule
from quicksilver.runtime.generation import QuickSilverForCausalLM
from tests import tiny
from tests.e2e.prompts import HALTING, PROMPT, left_padded
from tests.engines import fusion_plan, halting_plan

PLANS = {
    "dense": Plan.dense(),
    "forced": HALTING,
    "halting": halting_plan(EntropyRule(7.0), PropagateFill()),
    "fused": fusion_plan(RandomFusionRule(0.6), scope="all"),
}
SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9}
FREE = {"eos_token_id": None, "pad_token_id": 0}  # nothing ends before it is full

Generated = tuple[Tensor, Any]


class Recorder(BaseStreamer):
    """Keeps what it is given, and that it was told the end."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.received.append(value.tolist())

    def end(self) -> None:
        self.received.append("end")


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Generated]]:
    """Return a function that generates by our loop and by transformers': tokens and statistics of each."""
    passes, forward = [], QuickSilverForCausalLM.forward

    @wraps(forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return forward(self, *args, **kwargs)

    def run(model: Any, made: Callable[[], dict[str, Any]] = dict, **options: Any) -> list[Generated]:
        results = []
        for sample in (None, GenerationMixin._sample):
            with monkeypatch.context() as patch:
                patch.setattr(QuickSilverForCausalLM, "forward", counted)
                if sample is not None:
                    patch.setattr(QuickSilverForCausalLM, "_sample", sample)
                passes.clear()
                torch.manual_seed(7)
                tokens = model.generate(**({"input_ids": PROMPT} | options | made()))
            results.append((tokens, model.stats))
            assert (len(passes) == 1) == (sample is None)  # ours feeds what follows the prompt past `forward`
        return results

    return run


def assert_same(results: list[Generated]) -> Tensor:
    """Check that both loops gave the same; return the tokens."""
    (tokens, stats), (expected, expected_stats) = results
    assert torch.equal(tokens, expected)
    assert stats == expected_stats
    return tokens


@pytest.mark.parametrize(
    "options", [{}, SAMPLING, SAMPLING | {"repetition_penalty": 1.4}], ids=["greedy", "p", "again"]
)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tokens_and_counts(loops: Any, family: str, plan: str, options: dict[str, Any]) -> None:
    model = quicksilver.accelerate(tiny.model(family), PLANS[plan])
    for inputs in ({}, left_padded()):
        tokens = assert_same(loops(model, **inputs, **options, **FREE, max_new_tokens=14))
        assert tokens.shape[1] == 9 + 14


@pytest.mark.parametrize("plan", ["dense", "forced"])
def test_sequences_that_end_early_are_padded_and_counted(loops: Any, plan: str) -> None:
    model = quicksilver.accelerate(tiny.model("llama"), PLANS[plan])
    free = model.generate(**left_padded(), **FREE, max_new_tokens=12)
    for last in ([int(free[1, 12])], [int(free[0, 10]), int(free[2, 14])]):  # of some sequences before others
        tokens = assert_same(loops(model, **left_padded(), max_new_tokens=12, eos_token_id=last, pad_token_id=299))
        assert (tokens == 299).any()
    every = free[:, 11].tolist()  # all end before the length does
    tokens = assert_same(loops(model, **left_padded(), max_new_tokens=12, eos_token_id=every, pad_token_id=299))
    assert tokens.shape[1] <= 12


def test_returned_sequences_and_a_chunked_prompt(loops: Any) -> None:
    model = quicksilver.accelerate(tiny.model("llama"), HALTING)
    options = SAMPLING | FREE | {"max_new_tokens": 8}
    assert assert_same(loops(model, **left_padded(), **options, num_return_sequences=2)).shape[0] == 6
    whole, chunked = (
        model.generate(**left_padded(), **FREE, max_new_tokens=8, prefill_chunk_size=n) for n in (None, 3)
    )
    assert torch.equal(whole, chunked)


def test_a_streamer_is_given_the_same(loops: Any) -> None:
    model, streamers = quicksilver.accelerate(tiny.model("gpt2")), []

    def made() -> dict[str, Any]:
        streamers.append(Recorder())
        return {"streamer": streamers[-1]}

    tokens = assert_same(loops(model, made, **FREE, max_new_tokens=6))
    assert streamers[0].received == streamers[1].received
    assert streamers[0].received == [PROMPT.tolist(), *([token] for token in tokens[0, 9:].tolist()), "end"]


def test_stop_strings(loops: Any) -> None:
    model, tokenizer = quicksilver.accelerate(tiny.model("llama")), tiny.tokenizer()
    free = model.generate(**left_padded(), **FREE, max_new_tokens=12)
    texts = [[tokenizer.decode([token]) for token in row] for row in free[:, 11:].tolist()]
    stops = [next(text for text in row if text.isprintable() and text.isascii() and text) for row in texts]
    options = left_padded() | {"max_new_tokens": 12, "pad_token_id": 299, "tokenizer": tokenizer}
    tokens = assert_same(loops(model, **options, stop_strings=stops, eos_token_id=None))
    assert tokens.shape[1] < 9 + 12
    tokens = assert_same(loops(model, **options, stop_strings=stops[:1], eos_token_id=298))  # which never comes
    assert (tokens == 299).any()


def test_every_criterion_is_asked_after_every_token(loops: Any) -> None:
    class Some(StoppingCriteria):
        """Ends the first sequence at 12 tokens, all at 14."""

        def __init__(self) -> None:
            self.asked: list[Any] = []

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            self.asked.append((input_ids.tolist(), scores))
            return torch.tensor([True, False, False]) if input_ids.shape[1] == 12 else input_ids.shape[1] >= 14

    model, criteria = quicksilver.accelerate(tiny.model("gpt2")), []

    def made() -> dict[str, Any]:
        criteria.append(Some())
        return {"stopping_criteria": StoppingCriteriaList([criteria[-1]])}

    for options, columns in (({"max_new_tokens": 9}, 14), ({"max_new_tokens": 4}, 13)):
        assert assert_same(loops(model, made, **left_padded(), **FREE, **options)).shape[1] == columns
        assert criteria[-1].asked == criteria[-2].asked
        assert len(criteria[-1].asked) == columns - 9


def test_processors_see_the_same(loops: Any) -> None:
    seen: list[Any] = []

    def spoil(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((input_ids.clone(), scores.clone()))
        scores[:, ::2] = -torch.inf  # in place
        return scores

    model = quicksilver.accelerate(tiny.model("llama"))
    assert_same(loops(model, **left_padded(), **FREE, max_new_tokens=5, logits_processor=LogitsProcessorList([spoil])))
    for (ids, scores), (expected_ids, expected) in zip(seen[:5], seen[5:], strict=True):
        assert torch.equal(ids, expected_ids)
        assert torch.equal(scores, expected)


def test_a_second_turn_continues_the_cache(loops: Any) -> None:
    model, sequences = quicksilver.accelerate(tiny.model("gpt2"), HALTING), []
    for sample in (QuickSilverForCausalLM._sample, GenerationMixin._sample):
        first = model.generate(**left_padded(), **FREE, max_new_tokens=4, return_dict_in_generate=True)
        ids = torch.cat((first.sequences, first.sequences[:, :3]), 1)
        mask = torch.cat((left_padded()["attention_mask"], torch.ones(3, 7, dtype=torch.long)), 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QuickSilverForCausalLM, "_sample", sample)
            cache = first.past_key_values
            second = model.generate(ids, attention_mask=mask, past_key_values=cache, **FREE, max_new_tokens=5)
        sequences.append((second, cache.get_seq_length(), cache.seq_lengths))
    assert torch.equal(sequences[0][0], sequences[1][0])
    assert sequences[0][1:] == sequences[1][1:] == (20, [20, 16, 12])


def test_hooks_see_every_token() -> None:
    calls: list[int] = []
    model = quicksilver.accelerate(tiny.model("llama"))
    wanted = model.generate(PROMPT, **FREE, max_new_tokens=5)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(PROMPT, **FREE, max_new_tokens=5), wanted)
    handle.remove()
    assert len(calls) == 5
