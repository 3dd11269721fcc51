"""Tokens that a cache holds and a caller no longer wants: hidden by a mask, cropped, or fed again by `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import quicksilver
from quicksilver.errors import InputError, UnsupportedFeatureError
from quicksilver.plan import Plan
from quicksilver.rules import ForcedRule, KVConfig, PropagateFill, RandomFusionRule, ZeroFill
from tests import tiny
from tests.e2e.prompts import ATOL, HALTING, PROMPT, left_padded
from tests.engines import fusion_plan, halting_plan, skipping_plan
from tests.tolerances import KERNEL_LOGITS

DEPTHS = ForcedRule((1, 3, 2, 4))
PLANS = {
    "dense": Plan.dense(),
    "drop": HALTING,
    "propagate": halting_plan(DEPTHS, PropagateFill()),
    "zero": halting_plan(DEPTHS, ZeroFill()),
    "8-bit entries": Plan("coded", kv=KVConfig(bits=8)),
    "16-bit entries": Plan("halves", kv=KVConfig(bits=16)),
    "skipping": skipping_plan(0.1),
}
FUSED = fusion_plan(RandomFusionRule(0.7), scope="prompt")
FREE = {"eos_token_id": None, "pad_token_id": 0}
IDS = tiny.token_ids(8, seed=4)[None]
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1]])
VISIBLE = IDS[:, [0, 1, 2, 3, 6, 7]]


def fed_in_turns(model: Any, mask: Tensor | None, ids: Tensor = IDS, first: int = 6, **options: Any) -> Tensor:
    """Return the logits of what follows the first columns, fed with a mask over all of them."""
    cache = model(ids[:, :first], use_cache=True).past_key_values
    return model(ids[:, first:], attention_mask=mask, past_key_values=cache, **options).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_mask_over_cached_columns_is_transformers(family: str) -> None:
    reference = tiny.model(family)
    cache = DynamicCache(config=reference.config)
    reference(IDS[:, :6], past_key_values=cache)
    expected = reference(
        IDS[:, 6:], attention_mask=MASK, position_ids=torch.tensor([[4, 5]]), past_key_values=cache
    ).logits
    logits = fed_in_turns(quicksilver.accelerate(reference), MASK)
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_the_rest_is_as_if_hidden_tokens_had_not_been_fed(family: str, plan: str) -> None:
    model = quicksilver.accelerate(tiny.model(family), PLANS[plan])
    torch.testing.assert_close(fed_in_turns(model, MASK), model(VISIBLE).logits[:, 4:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_quantized_weights_too(family: str, kernels: Any) -> None:
    model = quicksilver.accelerate(tiny.quantized(family), kernels=kernels)
    torch.testing.assert_close(fed_in_turns(model, MASK), model(VISIBLE).logits[:, 4:], atol=KERNEL_LOGITS, rtol=0)


@pytest.mark.parametrize("plan", ["dense", "drop", "propagate"])
def test_a_row_that_ended_early_goes_on_as_if_alone(plan: str) -> None:
    """The next turn of a batch masks the padding that followed a row's end."""
    model = quicksilver.accelerate(tiny.model("llama"), PLANS[plan])
    turn, inputs = tiny.token_ids(6, seed=11).view(2, 3), left_padded((9, 5))
    free = model.generate(**inputs, **FREE, max_new_tokens=8)
    options = {"eos_token_id": int(free[1, 11]), "pad_token_id": 299, "return_dict_in_generate": True}
    first = model.generate(**inputs, **options, max_new_tokens=8)
    ids = torch.cat((first.sequences, turn), 1)
    mask = (ids != 299).long()
    mask[:, :9] = inputs["attention_mask"]
    assert (mask[:, 9:] == 0).any()
    second = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **FREE, max_new_tokens=4)
    for row, real in enumerate(mask.bool()):
        alone = model.generate(ids[row][real][None], **FREE, max_new_tokens=4)
        assert second[row, -4:].tolist() == alone[0, -4:].tolist()


def test_masks_of_what_cannot_be_hidden_or_shown_are_refused(model: Any) -> None:
    for mask in ([1, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]):
        with pytest.raises(InputError, match="row 0"):
            fed_in_turns(model, torch.tensor([mask]))
    inputs = left_padded((4, 3))
    cache = model(**inputs).past_key_values
    with pytest.raises(InputError, match=r"column 0 of row 1, which was padding"):
        model(torch.ones(2, 1, dtype=torch.long), attention_mask=torch.ones(2, 5), past_key_values=cache)


def test_fused_tokens_are_not_cut_apart() -> None:
    model = quicksilver.accelerate(tiny.model("llama"), FUSED)
    cache = model(IDS[:, :6], logits_to_keep=1).past_key_values
    with pytest.raises(InputError, match="the plan has fused tokens there"):
        model(IDS[:, 6:], attention_mask=MASK, past_key_values=cache)


def test_positions_that_the_mask_implies_are_taken_and_others_refused(model: Any) -> None:
    plain = fed_in_turns(model, MASK)
    assert torch.equal(fed_in_turns(model, MASK, position_ids=torch.tensor([[4, 5]])), plain)
    with pytest.raises(UnsupportedFeatureError, match="position_ids"):
        fed_in_turns(model, MASK, position_ids=torch.tensor([[6, 7]]))
    with pytest.raises(InputError, match="position_ids of shape"):
        fed_in_turns(model, MASK, position_ids=torch.tensor([[4, 5, 6]]))
    inputs = left_padded((4, 2))
    positions = torch.tensor([[0, 1, 2, 3], [1, 1, 0, 1]])  # of padding, transformers says 1
    assert torch.equal(model(**inputs, position_ids=positions).logits, model(**inputs).logits)
    expected = model.generate(**inputs, **FREE, max_new_tokens=3)
    assert torch.equal(model.generate(**inputs, **FREE, max_new_tokens=3, position_ids=positions), expected)


@pytest.mark.parametrize("plan", [*PLANS, "fused"])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_generate_from_a_cache_that_holds_the_prompt(family: str, plan: str) -> None:
    model = quicksilver.accelerate(tiny.model(family), FUSED if plan == "fused" else PLANS[plan])
    for inputs in ({"input_ids": PROMPT}, left_padded((9, 5))):
        expected = model.generate(**inputs, **FREE, max_new_tokens=6)
        cache = model(**inputs, logits_to_keep=1).past_key_values
        assert torch.equal(model.generate(**inputs, **FREE, max_new_tokens=6, past_key_values=cache), expected)
        assert cache.get_seq_length() == 9 + 5


def test_a_cache_that_is_no_beginning_of_the_prompt_is_refused(model: Any) -> None:
    cache = model(PROMPT).past_key_values
    other = torch.cat((PROMPT, PROMPT), 1)
    other[0, 4] += 1
    for ids, problem in ((PROMPT[:, :5], "holds 9 columns and the prompt 5"), (other, "differ at column 4")):
        with pytest.raises(InputError, match=problem):
            model.generate(ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(InputError, match="use_cache=False"):
        model.generate(PROMPT, past_key_values=cache, use_cache=False, max_new_tokens=2)
    whole = torch.cat((PROMPT, PROMPT), 1)  # what was refused has left the cache as it was
    expected = model.generate(whole, **FREE, max_new_tokens=3)
    assert torch.equal(model.generate(whole, **FREE, max_new_tokens=3, past_key_values=cache), expected)


@pytest.mark.parametrize("plan", PLANS)
def test_crop_then_other_tokens(plan: str) -> None:
    model = quicksilver.accelerate(tiny.model("qwen2"), PLANS[plan])
    for crop, kept in ((-3, 6), (4, 4), (-9, 0), (0, 9)):
        inputs = left_padded((9, 7))
        cache = model(**inputs).past_key_values
        cache.crop(crop)
        assert cache.get_seq_length() == kept
        ids = torch.cat((inputs["input_ids"][:, :kept], IDS[:, :4].expand(2, -1)), 1)
        mask = torch.cat((inputs["attention_mask"][:, :kept], torch.ones(2, 4, dtype=torch.long)), 1)
        logits = model(ids[:, kept:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids, attention_mask=mask).logits[:, kept:], atol=ATOL, rtol=0)
    for beyond in (-20, 20):
        with pytest.raises(InputError, match="does not fit"):
            cache.crop(beyond)


@pytest.mark.parametrize("plan", ["dense", "propagate", "zero", "8-bit entries"])
def test_sequences_of_a_cache_are_chosen_and_repeated(plan: str) -> None:
    model = quicksilver.accelerate(tiny.model("llama"), PLANS[plan])
    inputs, turn = left_padded((9, 5, 7)), tiny.token_ids(12, seed=2).view(6, 2)
    for rows, change in (
        ([2, 0, 1], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1]))),
        ([1, 1, 0], lambda cache: cache.batch_select_indices(torch.tensor([1, 1, 0]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    ):
        cache = model(**inputs).past_key_values
        change(cache)
        ids = torch.cat((inputs["input_ids"][rows], turn[: len(rows)]), 1)
        mask = torch.cat((inputs["attention_mask"][rows], torch.ones(len(rows), 2, dtype=torch.long)), 1)
        expected = model(ids, attention_mask=mask).logits[:, 9:]
        logits = model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)
    with pytest.raises(InputError, match="do not choose"):
        cache.reorder_cache(torch.tensor([0, 6]))


def test_columns_to_keep_may_be_none_of_them_or_in_any_order(pair: tuple[Any, Any]) -> None:
    reference, model = pair
    for keep in (torch.tensor([], dtype=torch.long), torch.arange(8, -1, -1), torch.tensor([-1, 0])):
        expected, logits = (each(PROMPT, logits_to_keep=keep).logits for each in (reference, model))
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)
    padded = model(**left_padded(), logits_to_keep=torch.tensor([], dtype=torch.long)).logits
    assert padded.shape == (3, 0, tiny.VOCAB)
    for wrong in (torch.tensor([]), torch.tensor([9])):
        with pytest.raises(InputError, match="logits_to_keep"):
            model(PROMPT, logits_to_keep=wrong)


def test_a_call_that_is_refused_takes_nothing_back(model: Any) -> None:
    other = quicksilver.accelerate(tiny.model("llama"), HALTING)
    far, wrong = torch.tensor([[6, 7]]), torch.tensor([[5, tiny.VOCAB]])
    for call in (
        lambda cache: model(IDS[:, 6:], attention_mask=MASK, past_key_values=cache, position_ids=far),
        lambda cache: model(wrong, attention_mask=MASK, past_key_values=cache),
        lambda cache: other(IDS[:, 6:], attention_mask=MASK, past_key_values=cache),
        lambda cache: cache.batch_repeat_interleave(0),
        lambda cache: cache.batch_select_indices([]),
        lambda cache: cache.crop("a"),
    ):
        cache = model(IDS[:, :6]).past_key_values
        with pytest.raises((InputError, UnsupportedFeatureError)):
            call(cache)
        logits = model(IDS[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(IDS).logits[:, 6:], atol=ATOL, rtol=0)


def test_a_cache_of_another_batch_is_said_to_be_one(model: Any) -> None:
    cache = model(IDS[:, :6].expand(2, -1)).past_key_values
    with pytest.raises(InputError, match="1 sequences were given to a cache of 2"):
        model(IDS[:, 6:], attention_mask=MASK, past_key_values=cache)


def test_columns_to_keep_may_be_named_as_transformers_takes_them(pair: tuple[Any, Any]) -> None:
    reference, model = pair
    for keep in ([0, 2], slice(2, 5), slice(None, None, 3), torch.tensor([3, 1]).numpy(), [True, False, True] * 3):
        expected, logits = (each(PROMPT, logits_to_keep=keep).logits for each in (reference, model))
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)
    assert torch.equal(model(PROMPT, logits_to_keep=None).logits, model(PROMPT).logits)
    with pytest.raises(InputError, match="logits_to_keep"):
        model(PROMPT, logits_to_keep="last")
