"""The habits of transformers' users: `generate` gives here what it gives there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import quicksilver
from quicksilver.errors import InputError
from quicksilver.plan import Plan
from quicksilver.rules import KVConfig
from tests import tiny
from tests.e2e.prompts import ATOL, HALTING, PROMPT, left_padded
from tests.tolerances import LOSS


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_equals_transformers(family: str, tiny_model_dir: Callable[[str], Path]) -> None:
    """With eager attention: in transformers 5.0 Gemma 2's other one leaves scores unbounded."""
    folder = tiny_model_dir(family)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model = quicksilver.load(folder)
    for inputs in ({"input_ids": PROMPT}, left_padded()):
        expected = reference.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False), expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sampling_equals_transformers_for_the_same_seed(family: str) -> None:
    reference = tiny.model(family)
    model = quicksilver.accelerate(reference)
    options = {"max_new_tokens": 16, "do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9}
    outputs = []
    for each in (reference, model):
        torch.manual_seed(7)
        outputs.append(each.generate(**left_padded(), **options, repetition_penalty=1.2))
    assert torch.equal(*outputs)


def test_generation_config_object_and_defaults(pair: tuple[Any, Any]) -> None:
    reference, model = pair
    config = GenerationConfig(max_new_tokens=5, min_new_tokens=5, no_repeat_ngram_size=2, pad_token_id=0)
    expected = reference.generate(PROMPT, generation_config=config)
    assert torch.equal(model.generate(PROMPT, generation_config=config), expected)
    assert model.generation_config is reference.generation_config


def test_sequences_that_end_early_are_padded_as_transformers_pads(pair: tuple[Any, Any]) -> None:
    reference, model = pair
    free = reference.generate(**left_padded(), max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    options = {"max_new_tokens": 8, "eos_token_id": int(free[1, -6]), "pad_token_id": 299}
    expected = reference.generate(**left_padded(), **options)
    assert (expected == 299).any()
    assert torch.equal(model.generate(**left_padded(), **options), expected)


def test_num_return_sequences(pair: tuple[Any, Any]) -> None:
    outputs = []
    for each in pair:
        torch.manual_seed(1)
        outputs.append(each.generate(**left_padded(), max_new_tokens=6, do_sample=True, num_return_sequences=3))
    assert outputs[0].shape[0] == 9
    assert torch.equal(*outputs)


def test_text_streamer(pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    streamed = []
    for each in pair:
        streamer = TextStreamer(tiny.tokenizer(), skip_prompt=True)
        each.generate(PROMPT, max_new_tokens=12, do_sample=False, streamer=streamer)
        streamed.append(capsys.readouterr().out)
    assert streamed[0] == streamed[1]
    assert streamed[0].strip()


def test_logits_processor(pair: tuple[Any, Any]) -> None:
    class OnlyEven(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, 1::2] = -torch.inf
            return scores

    reference, model = pair
    processors = LogitsProcessorList([OnlyEven()])
    expected = reference.generate(PROMPT, max_new_tokens=8, logits_processor=processors)
    generated = model.generate(PROMPT, max_new_tokens=8, logits_processor=processors)
    assert (generated[:, PROMPT.shape[1] :] % 2 == 0).all()
    assert torch.equal(generated, expected)


def test_stopping_criteria(model: Any) -> None:
    class AfterTwelve(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)

    criteria = StoppingCriteriaList([AfterTwelve()])
    generated = model.generate(PROMPT, max_new_tokens=30, eos_token_id=None, stopping_criteria=criteria)
    assert generated.shape == (1, 12)


def test_max_time(model: Any) -> None:
    generated = model.generate(PROMPT, max_new_tokens=30, eos_token_id=None, max_time=0.0)
    assert generated.shape[1] == PROMPT.shape[1] + 1


def test_stop_strings(pair: tuple[Any, Any]) -> None:
    reference, model = pair
    tokenizer, options = tiny.tokenizer(), {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    free = reference.generate(PROMPT, **options)[0, PROMPT.shape[1] :]
    stop = next(
        text
        for token in free[3:].tolist()
        if (text := tokenizer.decode([token])).isprintable() and text.isascii() and text
    )
    expected = reference.generate(PROMPT, **options, stop_strings=[stop], tokenizer=tokenizer)
    generated = model.generate(PROMPT, **options, stop_strings=[stop], tokenizer=tokenizer)
    assert generated.shape[1] < PROMPT.shape[1] + 20
    assert torch.equal(generated, expected)


def test_scores_logits_and_the_cache_are_returned(pair: tuple[Any, Any]) -> None:
    reference, model = pair
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, output = (each.generate(**left_padded(), **options, temperature=1.0) for each in pair)
    assert torch.equal(output.sequences, expected.sequences)
    assert len(output.scores) == len(output.logits) == len(expected.scores)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(output[name]), torch.stack(expected[name]), atol=ATOL, rtol=0)
    assert output.past_key_values.seq_lengths == [9 + 4, 5 + 4, 1 + 4]
    transition = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    wanted = reference.compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True)
    torch.testing.assert_close(transition, wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("plan", [Plan.dense(), HALTING], ids=["dense", "halting"])
def test_generation_without_a_cache_equals_cached(plan: Plan) -> None:
    model = quicksilver.accelerate(tiny.model("llama"), plan)
    cached = model.generate(**left_padded(), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**left_padded(), max_new_tokens=8, do_sample=False, use_cache=False), cached)


@pytest.mark.parametrize("plan", [Plan.dense(), HALTING], ids=["dense", "halting"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 50])
def test_chunked_prefill_equals_whole(plan: Plan, chunk: int) -> None:
    model = quicksilver.accelerate(tiny.model("qwen2"), plan)
    for inputs in ({"input_ids": PROMPT}, left_padded()):
        whole = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        chunked = model.generate(**inputs, max_new_tokens=8, do_sample=False, prefill_chunk_size=chunk)
        assert torch.equal(chunked, whole)


def test_chunked_prefill_of_a_chunk_that_is_all_padding(pair: tuple[Any, Any]) -> None:
    reference, model = pair
    inputs = left_padded((7, 5), columns=12)  # padded to a multiple, as tokenizers do: columns 0 to 4 hold nothing
    expected = reference.generate(**inputs, max_new_tokens=6, do_sample=False)
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("give_all_ids", [True, False], ids=["all ids", "new ids"])
@pytest.mark.parametrize("columns", [9, 12], ids=["longest unpadded", "all padded"])
def test_generation_continues_from_past_key_values(pair: tuple[Any, Any], give_all_ids: bool, columns: int) -> None:
    """A second turn, in the ways transformers accepts it: all ids or only the new ones, always the whole mask."""
    turn = tiny.token_ids(6, seed=11).view(2, 3)
    sequences = []
    for each in pair:
        inputs = left_padded((9, 5), columns)
        first = each.generate(**inputs, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
        ids = torch.cat((first.sequences, turn), 1)
        mask = torch.cat((inputs["attention_mask"], torch.ones(2, 4 + 3, dtype=torch.long)), 1)
        seen = first.sequences.shape[1] - 1  # the last generated token was never fed
        given = ids if give_all_ids or each is pair[0] else ids[:, seen:]  # transformers 5.0 wants all
        second = each.generate(
            given,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            max_new_tokens=5,
            min_new_tokens=5,
        )
        assert torch.equal(second[:, : given.shape[1]], given)
        sequences.append(second[:, given.shape[1] :])
    assert torch.equal(*sequences)


@pytest.mark.parametrize("plan", [Plan.dense(), HALTING], ids=["dense", "halting"])
def test_forward_continues_from_past_key_values(plan: Plan) -> None:
    model = quicksilver.accelerate(tiny.model("mistral"), plan)
    ids = tiny.token_ids(24, seed=5).view(2, 12)
    whole = model(ids).logits
    first = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=first.past_key_values, attention_mask=torch.ones(2, 12))
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), whole, atol=ATOL, rtol=0)
    assert rest.past_key_values is first.past_key_values
    assert rest.past_key_values.get_seq_length() == 12


def test_the_cache_has_two_names(model: Any) -> None:
    """Transformers called it `past_key_values` up to 5.23, and calls it `cache`."""
    ids = torch.cat((PROMPT, PROMPT), 1)
    expected = model.generate(ids, max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    for name in ("past_key_values", "cache"):
        first = model(PROMPT)
        assert model(PROMPT, **{name: first.past_key_values}).past_key_values is first.past_key_values
        options = {name: model(PROMPT).past_key_values, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **options), expected)
    both = dict.fromkeys(("past_key_values", "cache"), first.past_key_values)
    for call in (model, model.generate):
        with pytest.raises(InputError, match="two names"):
            call(PROMPT, **both)


def test_a_cache_is_continued_under_another_plan_where_entries_are_alike(model: Any) -> None:
    whole = torch.cat((PROMPT, PROMPT), 1)
    expected = model(whole).logits[:, PROMPT.shape[1] :]
    cache = model(PROMPT).past_key_values
    model.plan = Plan("coded", kv=KVConfig(bits=8))
    with pytest.raises(InputError, match="keeps entries of 32 bits, where the plan asks for entries of 8 bits"):
        model(PROMPT, past_key_values=cache)
    with pytest.raises(InputError, match="keeps entries of 32 bits"):
        model.generate(whole, past_key_values=cache, max_new_tokens=2)
    model.plan = "dense"
    torch.testing.assert_close(model(PROMPT, past_key_values=cache).logits, expected, atol=ATOL, rtol=0)


def test_a_cache_is_not_continued_by_another_batch(model: Any) -> None:
    cache = model(PROMPT).past_key_values
    with pytest.raises(InputError, match="2 sequences"):
        model(PROMPT.repeat(2, 1), past_key_values=cache)


@pytest.mark.parametrize("other", ["gpt2", "qwen2"], ids=["of another shape", "of the same shape"])
def test_a_cache_is_not_continued_by_another_model(model: Any, other: str) -> None:
    cache = quicksilver.accelerate(tiny.model(other))(PROMPT).past_key_values
    with pytest.raises(InputError, match="cache"):
        model(PROMPT, past_key_values=cache)


def test_prompts_padded_on_the_right_cannot_be_continued() -> None:
    """With the mask given, and with the mask that transformers infers from the padding id."""
    model, ids = quicksilver.accelerate(tiny.model("llama")), tiny.token_ids(8).view(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with pytest.raises(InputError, match="padded on the left"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(InputError, match="padded on the left"):
        model.generate(ids.masked_fill(mask == 0, 299), pad_token_id=299, eos_token_id=298, max_new_tokens=2)


def test_an_empty_prompt_is_refused(model: Any) -> None:
    empty = torch.empty((1, 0), dtype=torch.long)
    for call in (lambda: model.generate(empty), lambda: model.generate(inputs=None, input_ids=empty)):
        with pytest.raises(InputError, match="the prompt is empty"):
            call()


def test_too_many_new_tokens_are_refused_before_any_is_made() -> None:
    model, fed = quicksilver.accelerate(tiny.model("gpt2")), []
    ids = tiny.token_ids(40)[None]
    with pytest.raises(InputError, match="66 to feed"):
        model.generate(ids, max_new_tokens=27, stopping_criteria=[lambda *a: fed.append(1)])
    assert not fed
    assert model.generate(ids, max_new_tokens=25, eos_token_id=None, pad_token_id=0).shape[1] == 65


def test_a_model_called_while_generating_does_not_count() -> None:
    """Guidance by a second call of the same model, say: the run's statistics are the run's."""
    model = quicksilver.accelerate(tiny.model("gpt2"))

    def second_call(ids: Tensor, scores: Tensor) -> Tensor:
        model(ids[:, :2])
        return scores

    model.generate(tiny.token_ids(5)[None], max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    alone = model.stats.tokens
    processors = LogitsProcessorList([second_call])
    model.generate(
        tiny.token_ids(5)[None], max_new_tokens=3, eos_token_id=None, pad_token_id=0, logits_processor=processors
    )
    assert model.stats.tokens == alone == 7


def test_left_padding_predicts_nothing() -> None:
    model = quicksilver.accelerate(tiny.model("llama"))
    first, second = tiny.token_ids(6, 1), tiny.token_ids(4, 2)
    ids = torch.stack((first, torch.cat((torch.zeros(2, dtype=torch.long), second))))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    batch = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    alone = [model(each[None], labels=each[None]).loss for each in (first, second)]
    assert batch.item() == pytest.approx((5 * alone[0] + 3 * alone[1]).item() / 8, abs=LOSS)
