"""Our `generate` gives transformers' tokens; a padded row gives what it gives alone; what a call leaves behind."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationMixin,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import BaseStreamer

import quicksilver
from quicksilver.errors import InputError, UnsupportedFeatureError
from quicksilver.model import QuickSilverForCausalLM
from quicksilver.plan import Plan
from quicksilver.rules import EntropyRule, PropagateFill, RandomFusionRule
from quicksilver.runtime.sampling import Draw
from tests import HANGS, tiny
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
LENGTHS = (9, 5, 1)


class Recorder(BaseStreamer):
    """Keeps what it is given, and that it was told the end."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.received.append(value.tolist())

    def end(self) -> None:
        self.received.append("end")


def alone(model: Any, row: int, **options: Any) -> list[int]:
    """Return what the prompt of a row of `left_padded` is continued by, fed without the others."""
    ids = tiny.token_ids(LENGTHS[row], seed=row)[None]
    options |= {"attention_mask": torch.ones_like(ids)}  # else a token that is the padding's would be taken for it
    return model.generate(ids, **options)[0, LENGTHS[row] :].tolist()


@pytest.mark.parametrize("options", [{}, SAMPLING, SAMPLING | {"repetition_penalty": 1.4}], ids=["greedy", "p", "rep"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_tokens_are_those_of_transformers_loop_over_our_model(
    family: str, plan: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1, "use_cache": False}

    monkeypatch.setattr(QuickSilverForCausalLM, "prepare_inputs_for_generation", whole)
    switches = "_optimize_model_for_decode"  # of mixtures of experts, which transformers' models have
    monkeypatch.setattr(QuickSilverForCausalLM, switches, lambda self: nullcontext(), raising=False)
    model, tokens = quicksilver.accelerate(tiny.model(family), PLANS[plan]), []
    for generate in (model.generate, lambda **given: GenerationMixin.generate(model, **given, use_cache=False)):
        torch.manual_seed(7)
        tokens.append(generate(input_ids=PROMPT, **options, **FREE, max_new_tokens=10))
    assert torch.equal(*tokens)
    assert tokens[0].shape[1] == 9 + 10


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.6},
        {"encoder_no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 9]]},
        {"sequence_bias": [[[5], 3.0], [[7, 9], -2.0]]},
        {"min_new_tokens": 6},
        {"forced_eos_token_id": 17},
        {"forced_bos_token_id": 3},
        {"suppress_tokens": list(range(40))},
        {"begin_suppress_tokens": list(range(0, 300, 2))},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"renormalize_logits": True, "remove_invalid_values": True},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(len(ids), 200))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_padded_row_is_the_row_alone_and_that_is_transformers(options: dict[str, Any]) -> None:
    reference = tiny.model("gpt2")
    model = quicksilver.accelerate(reference)
    options = {"max_new_tokens": 10, "eos_token_id": [4, 60], "pad_token_id": 4} | options
    batch = model.generate(**left_padded(LENGTHS), **options)
    for row in range(len(LENGTHS)):
        expected = alone(reference, row, **options)
        assert alone(model, row, **options) == expected
        assert batch[row, 9:].tolist() == expected + [4] * (batch.shape[1] - 9 - len(expected))


@pytest.mark.parametrize("plan", ["dense", "forced", "halting"])
def test_rows_that_end_early_are_padded_and_leave_the_batch(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quicksilver.accelerate(tiny.model("llama"), PLANS[plan])
    free = model.generate(**left_padded(LENGTHS), **FREE, max_new_tokens=12)
    ends = [int(free[1, 12]), int(free[2, 14])]
    options = {"max_new_tokens": 12, "eos_token_id": ends, "pad_token_id": 299}
    steps, run = [], model.decoder.run
    monkeypatch.setattr(
        model.decoder, "run", lambda ids, lengths, *rest: steps.append(lengths) or run(ids, lengths, *rest)
    )
    output = model.generate(**left_padded(LENGTHS), **options, return_dict_in_generate=True)
    assert model.stats.kv_used_bytes == output.past_key_values.used_nbytes
    assert all(length == 1 for lengths in steps[1:] for length in lengths)
    assert len(steps[-1]) < len(steps[0])
    counts = []
    for row, tokens in enumerate(output.sequences[:, 9:].tolist()):
        wanted = alone(model, row, **options)
        assert tokens == wanted + [299] * (len(tokens) - len(wanted))
        counts.append(len(wanted))
    assert min(counts) < max(counts)
    longest = max(counts)  # whose last token is not fed
    fed = [length + count - (count == longest) for length, count in zip(LENGTHS, counts, strict=True)]
    assert output.past_key_values.seq_lengths == fed


@pytest.mark.parametrize("eos", [None, 0, 17, [3, 17], torch.tensor([3, 17])], ids=str)
def test_every_form_of_eos_is_transformers(eos: Any) -> None:
    reference = tiny.model("gpt2")
    model = quicksilver.accelerate(reference)
    for at in (2, 5):
        bias = {"sequence_bias": [[[17], 0.0]], "forced_eos_token_id": None}
        options = {"eos_token_id": eos, "pad_token_id": 1, "max_new_tokens": at + 3, **bias}
        options["begin_suppress_tokens"] = [0]
        for more in ({}, {"forced_eos_token_id": 17}):
            expected = reference.generate(PROMPT, **{**options, **more})
            assert torch.equal(model.generate(PROMPT, **{**options, **more}), expected)


def test_returned_sequences_and_a_chunked_prompt() -> None:
    reference = tiny.model("llama")
    model, options = (
        quicksilver.accelerate(reference),
        SAMPLING | FREE | {"max_new_tokens": 8, "num_return_sequences": 2},
    )
    tokens = []
    for each in (reference, model):
        torch.manual_seed(7)
        tokens.append(each.generate(**left_padded(), **options))
    assert torch.equal(*tokens)
    assert model.stats.tokens == 9 + 5 + 1 + 6 * 7  # prompts are fed once
    model.plan = HALTING
    whole, chunked = (
        model.generate(**left_padded(), **FREE, max_new_tokens=8, prefill_chunk_size=n) for n in (None, 3)
    )
    assert torch.equal(whole, chunked)
    cache = model(PROMPT).past_key_values  # of one sequence: it is repeated
    torch.manual_seed(7)
    repeated = model.generate(PROMPT, past_key_values=cache, **options)
    torch.manual_seed(7)
    assert torch.equal(repeated, model.generate(PROMPT, **options))


def test_seeded_tokens_depend_on_seed_sequence_place_and_scores_alone() -> None:
    model, options = quicksilver.accelerate(tiny.model("llama"), HALTING), SAMPLING | FREE | {"max_new_tokens": 9}
    seeds = [11, 5, 2**64 - 1]
    batch = model.generate(**left_padded(LENGTHS), **options, seed=seeds)
    torch.manual_seed(123)  # PyTorch's generator does not matter
    for row, seed in enumerate(seeds):
        assert alone(model, row, **options, seed=[seed]) == batch[row, 9:].tolist()
    assert not torch.equal(model.generate(**left_padded(LENGTHS), **options, seed=11), batch)
    several = model.generate(PROMPT, **options, seed=11, num_return_sequences=3)
    assert len(set(map(tuple, several.tolist()))) == 3
    assert several[0].tolist() == model.generate(PROMPT, **options, seed=11)[0].tolist()
    halfway = model.generate(PROMPT, **{**options, "max_new_tokens": 4}, seed=[5], return_dict_in_generate=True)
    whole = model.generate(PROMPT, **options, seed=[5])
    assert whole[:, : 9 + 4].tolist() == halfway.sequences.tolist()
    again = model.generate(
        halfway.sequences, **{**options, "max_new_tokens": 5}, past_key_values=halfway.past_key_values, seed=[5]
    )
    assert torch.equal(again, whole)
    for wrong in ([1, 2], -1, [1.5], 2**64):
        with pytest.raises(InputError, match="seed"):
            model.generate(PROMPT, **options, seed=wrong)


def test_seeded_tokens_follow_the_distribution() -> None:
    scores = torch.tensor([[0.5, -torch.inf, 2.0, 1.0, -torch.inf, 0.0]])
    draws = torch.tensor([int(Draw(True, [(3, 0)])(scores, [place])) for place in range(20_000)])
    shares = torch.bincount(draws, minlength=6) / len(draws)
    torch.testing.assert_close(shares, scores[0].softmax(-1), atol=0.012, rtol=0)
    assert shares[1] == shares[4] == 0


def test_a_call_leaves_configurations_as_they_were() -> None:
    model = quicksilver.accelerate(tiny.model("gpt2"))
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens = 3
    before = config.to_dict(), model.generation_config.to_dict(), model.config.to_dict()
    model.generate(PROMPT, generation_config=config, do_sample=True, temperature=0.7)
    assert (config.to_dict(), model.generation_config.to_dict(), model.config.to_dict()) == before


def test_sampling_takes_the_fifty_likeliest_unless_told_otherwise() -> None:
    """A default of transformers' that nothing shows."""
    model, seen = quicksilver.accelerate(tiny.model("gpt2")), []
    for more, left in (({}, 50), ({"top_k": 0}, tiny.VOCAB), ({"top_k": 7}, 7)):
        output = model.generate(
            PROMPT, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, **more
        )
        seen.append((int(output.scores[0].isfinite().sum()), left))
    assert all(found == left for found, left in seen)


def test_a_streamer_is_given_every_token_once_and_told_the_end() -> None:
    model, streamer = quicksilver.accelerate(tiny.model("gpt2")), Recorder()
    tokens = model.generate(PROMPT, **FREE, max_new_tokens=6, streamer=streamer)
    assert streamer.received == [PROMPT.tolist(), *([token] for token in tokens[0, 9:].tolist()), "end"]


def test_a_reader_of_a_stream_is_not_left_waiting_by_an_error() -> None:
    def fail(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == 9 + 3:
            raise RuntimeError("at the third token")
        return scores

    model, streamer = quicksilver.accelerate(tiny.model("gpt2")), TextIteratorStreamer(tiny.tokenizer(), timeout=HANGS)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            model.generate(PROMPT, **FREE, max_new_tokens=9, streamer=streamer, logits_processor=[fail])
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    list(streamer)
    thread.join(timeout=HANGS)
    assert len(failed) == 1


def test_stop_strings_look_at_each_row_alone() -> None:
    reference, tokenizer = tiny.model("llama"), tiny.tokenizer()
    model = quicksilver.accelerate(reference)
    free = model.generate(**left_padded(), **FREE, max_new_tokens=12)
    texts = [[tokenizer.decode([token]) for token in row] for row in free[:, 11:].tolist()]
    stops = [next(text for text in row if text.isprintable() and text.isascii() and text) for row in texts]
    options = {"max_new_tokens": 12, "pad_token_id": 299, "eos_token_id": 298, "tokenizer": tokenizer}
    tokens = model.generate(**left_padded(), **options, stop_strings=stops[:2])
    for row in range(len(LENGTHS)):
        wanted = alone(reference, row, **options, stop_strings=stops[:2])
        assert tokens[row, 9:].tolist() == wanted + [299] * (tokens.shape[1] - 9 - len(wanted))
    with pytest.raises(InputError, match="tokenizer"):
        model.generate(PROMPT, stop_strings=["a"], max_new_tokens=2)


def test_a_callers_own_criteria_and_processors_are_asked_as_by_transformers() -> None:
    class Some(StoppingCriteria):
        """Ends the first sequence at 12 tokens, all at 14."""

        def __init__(self) -> None:
            self.asked: list[Any] = []

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            self.asked.append((input_ids.tolist(), scores))
            return torch.tensor([True, False, False]) if input_ids.shape[1] == 12 else input_ids.shape[1] >= 14

    def spoil(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(input_ids.tolist())
        scores[:, ::2] = -torch.inf  # in place
        return scores

    reference = tiny.model("gpt2")
    for options, columns in (({"max_new_tokens": 9}, 14), ({"max_new_tokens": 4}, 13)):
        records = []
        for model in (reference, quicksilver.accelerate(reference)):
            criterion, seen = Some(), []
            tokens = model.generate(
                **left_padded(),
                **FREE,
                **options,
                stopping_criteria=StoppingCriteriaList([criterion]),
                logits_processor=[spoil],
            )
            records.append((tokens.tolist(), criterion.asked, seen))
        assert records[0] == records[1]
        assert len(records[1][1]) == len(records[1][2]) == columns - 9


def test_a_second_turn_continues_the_cache() -> None:
    model = quicksilver.accelerate(tiny.model("gpt2"), HALTING)
    first = model.generate(**left_padded(), **FREE, max_new_tokens=4, return_dict_in_generate=True)
    ids = torch.cat((first.sequences, first.sequences[:, :3]), 1)
    mask = torch.cat((left_padded()["attention_mask"], torch.ones(3, 7, dtype=torch.long)), 1)
    cache = first.past_key_values
    second = model.generate(ids, attention_mask=mask, past_key_values=cache, **FREE, max_new_tokens=5)
    assert torch.equal(second, model.generate(ids, attention_mask=mask, **FREE, max_new_tokens=5))
    assert (cache.get_seq_length(), cache.seq_lengths) == (20, [20, 16, 12])


def test_hooks_see_every_token() -> None:
    calls: list[int] = []
    model = quicksilver.accelerate(tiny.model("llama"))
    wanted = model.generate(PROMPT, **FREE, max_new_tokens=5)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(PROMPT, **FREE, max_new_tokens=5), wanted)
    handle.remove()
    assert len(calls) == 5


def test_tokens_are_fed_past_the_models_call_where_nobody_watches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = [], QuickSilverForCausalLM.forward

    @wraps(run)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(QuickSilverForCausalLM, "forward", counted)
    quicksilver.accelerate(tiny.model("gpt2")).generate(PROMPT, **FREE, max_new_tokens=5)
    assert len(calls) == 1


@pytest.mark.parametrize("plan", ["dense", "forced"])
def test_rows_that_ended_without_a_cache(plan: str) -> None:
    model = quicksilver.accelerate(tiny.model("gpt2"), PLANS[plan])
    free = model.generate(**left_padded(), **FREE, max_new_tokens=8)
    options: Callable[..., Any] = lambda **more: model.generate(  # noqa: E731
        **left_padded(), max_new_tokens=8, eos_token_id=int(free[1, 11]), pad_token_id=299, **more
    )
    assert torch.equal(options(use_cache=False), options())


@pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
def test_a_refused_call_takes_nothing_back_of_a_cache(fused: bool) -> None:
    plan = fusion_plan(RandomFusionRule(0.7), scope="prompt") if fused else Plan.dense()
    model = quicksilver.accelerate(tiny.model("llama"), plan)
    ids = torch.cat((PROMPT, PROMPT), 1)
    for prompt, wrong in (
        (PROMPT, {"seed": [1, 2], "do_sample": True}),
        (PROMPT, {"max_new_tokens": 500}),
        (PROMPT, {"stop_strings": ["a"]}),
        (PROMPT, {"position_ids": torch.arange(1, 10)[None]}),
        (PROMPT, {"prefill_chunk_size": -1}),
        (ids[:, 9:12], {"attention_mask": torch.ones(1, 11)}),  # neither the new tokens' columns nor all of them
        (ids[:, 9:12], {"attention_mask": torch.ones(1, 13)}),
    ):
        cache = model(PROMPT, logits_to_keep=1).past_key_values
        with pytest.raises((InputError, UnsupportedFeatureError)):
            model.generate(prompt, past_key_values=cache, **{"max_new_tokens": 3, **wrong})
        assert cache.get_seq_length() == 9
        expected = model.generate(ids, **FREE, max_new_tokens=3) if not fused else None
        if expected is not None:
            assert torch.equal(model.generate(ids, **FREE, max_new_tokens=3, past_key_values=cache), expected)


def test_wrong_labels_and_columns_are_refused_before_anything_is_fed(model: Any) -> None:
    cache = model(PROMPT).past_key_values
    for wrong in ({"labels": torch.ones(1, 3, dtype=torch.long)}, {"logits_to_keep": [9]}):
        with pytest.raises(InputError):
            model(PROMPT, past_key_values=cache, **wrong)
    assert cache.get_seq_length() == 9


def test_criteria_of_a_kind_stand_in_for_those_of_settings() -> None:
    reference = tiny.model("llama")
    model = quicksilver.accelerate(reference)
    free = reference.generate(**left_padded(), **FREE, max_new_tokens=8)
    ends = EosTokenCriteria(int(free[1, 11]))
    for criteria, options in (
        ([MaxLengthCriteria(16)], {"max_new_tokens": 3, **FREE}),
        ([ends], {"max_new_tokens": 8, "eos_token_id": int(free[0, 10]), "pad_token_id": 299}),
        ([ends], {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 299}),
    ):
        options["stopping_criteria"] = StoppingCriteriaList(criteria)
        expected = reference.generate(**left_padded(), **options)
        assert torch.equal(model.generate(**left_padded(), **options), expected)


def test_guidance_goes_before_other_processors() -> None:
    reference = tiny.model("gpt2")
    model = quicksilver.accelerate(reference)
    options = {**FREE, "max_new_tokens": 6, "guidance_scale": 1.7, "repetition_penalty": 1.8}
    assert torch.equal(model.generate(PROMPT, **options), reference.generate(PROMPT, **options))


def test_a_padded_cache_is_continued_without_a_mask_as_with_it(model: Any) -> None:
    inputs = left_padded((9, 5))
    ids = torch.cat((inputs["input_ids"], tiny.token_ids(6, seed=11).view(2, 3)), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)), 1)
    options = {**FREE, "pad_token_id": None, "max_new_tokens": 5, "repetition_penalty": 1.5}
    tokens = [
        model.generate(ids, past_key_values=model(**inputs).past_key_values, **options, **given)
        for given in ({}, {"attention_mask": mask})
    ]
    assert torch.equal(*tokens)


def test_a_prompts_chunks_ask_the_head_once() -> None:
    model = quicksilver.accelerate(tiny.model("gpt2"))
    flops = []
    for chunk in (None, 2):
        model.generate(PROMPT, **FREE, max_new_tokens=1, prefill_chunk_size=chunk)
        flops.append(model.stats.flops)
    assert flops[0] == flops[1]


def test_nothing_is_drawn_from_scores_that_leave_no_token() -> None:
    with pytest.raises(InputError, match="no token can be drawn"):
        Draw(True, [(3, 0)])(torch.full((1, 4), -torch.inf), [0])
