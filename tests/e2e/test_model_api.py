"""The habits of transformers' users: the model's call, what is refused, `accelerate`, `load` and `stats`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
)

import quicksilver
from quicksilver.cache import RaggedKVCache
from quicksilver.errors import InputError, PlanError, UnsupportedFeatureError
from quicksilver.plan import Plan
from quicksilver.rules import ForcedRule
from tests import tiny
from tests.e2e.prompts import ATOL, HALTING, PROMPT, left_padded
from tests.engines import halting_plan
from tests.tolerances import LOSS


def test_loss_equals_transformers(pair: tuple[Any, Any]) -> None:
    ids = tiny.token_ids(24).view(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    for target in (ids, labels):
        expected, output = (each(ids, labels=target) for each in pair)
        assert abs(output.loss - expected.loss) < LOSS


def test_loss_of_right_padded_rows_equals_transformers(pair: tuple[Any, Any]) -> None:
    ids, mask = tiny.token_ids(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    expected, output = (each(ids, attention_mask=mask, labels=labels) for each in pair)
    assert abs(output.loss - expected.loss) < LOSS


def test_plain_tuples(pair: tuple[Any, Any]) -> None:
    reference, model = pair
    output = model(PROMPT, labels=PROMPT, return_dict=False)
    expected = reference(PROMPT, labels=PROMPT, return_dict=False)
    assert isinstance(output, tuple)
    assert len(output) == len(expected) == 3
    torch.testing.assert_close(output[:2], expected[:2], atol=ATOL, rtol=0)
    assert isinstance(output[2], RaggedKVCache)
    (logits,) = model(PROMPT, use_cache=False, return_dict=False)
    torch.testing.assert_close(logits, expected[1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("keep", [0, 1, 4, 9, torch.tensor([0, 3, 8])], ids=["all", "1", "4", "9", "indices"])
def test_logits_to_keep(pair: tuple[Any, Any], keep: int | Tensor) -> None:
    for inputs in ({"input_ids": PROMPT}, left_padded((9, 9))):
        expected, output = (each(**inputs, logits_to_keep=keep).logits for each in pair)
        assert output.shape == expected.shape
        torch.testing.assert_close(output, expected, atol=ATOL, rtol=0)


def test_padding_changes_no_real_token(pair: tuple[Any, Any]) -> None:
    _, model = pair
    rows = [tiny.token_ids(n, seed=n) for n in (9, 4)]
    alone = [model(row[None]).logits[0] for row in rows]
    ids, mask = torch.full((2, 9), 299), torch.zeros(2, 9, dtype=torch.long)
    ids[0], mask[0] = rows[0], 1
    for place in (slice(0, 4), slice(5, 9), [1, 2, 5, 7]):  # on the right, on the left, between
        ids[1], mask[1] = 299, 0
        ids[1, place], mask[1, place] = rows[1], 1
        logits = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[0], alone[0], atol=ATOL, rtol=0)
        torch.testing.assert_close(logits[1, place], alone[1], atol=ATOL, rtol=0)
        assert not logits[1, mask[1] == 0].any()


def test_right_padding_equals_transformers(pair: tuple[Any, Any]) -> None:
    ids, mask = tiny.token_ids(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    expected, output = (each(ids, attention_mask=mask).logits for each in pair)
    torch.testing.assert_close(output[0], expected[0], atol=ATOL, rtol=0)
    torch.testing.assert_close(output[1, :7], expected[1, :7], atol=ATOL, rtol=0)


def test_gradients_are_never_computed(model: Any) -> None:
    output = model(PROMPT, labels=PROMPT)
    assert not output.logits.requires_grad
    assert not output.loss.requires_grad


REFUSED_BY_GENERATE: dict[str, Callable[[], dict[str, Any]]] = {
    "num_beams": lambda: {"num_beams": 2},
    "beam sampling": lambda: {"num_beams": 2, "do_sample": True},
    "assistant_model": lambda: {"assistant_model": tiny.model("llama")},
    "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "contrastive": lambda: {"penalty_alpha": 0.6, "top_k": 4},
    "dola": lambda: {"dola_layers": "low"},
    "static cache": lambda: {"cache_implementation": "static"},
    "paged cache": lambda: {"cache_implementation": "paged"},
    "another cache": lambda: {"past_key_values": DynamicCache()},
    "output_hidden_states": lambda: {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_attentions": lambda: {"output_attentions": True, "return_dict_in_generate": True},
    "position_ids": lambda: {"position_ids": torch.arange(1, 10)[None]},
    "inputs_embeds": lambda: {"inputs_embeds": torch.zeros(1, 9, 32)},
}


@pytest.mark.parametrize("feature", REFUSED_BY_GENERATE)
def test_generate_refuses_what_it_cannot_do(model: Any, feature: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"not supported|must be a cache"):
        model.generate(PROMPT, max_new_tokens=3, **REFUSED_BY_GENERATE[feature]())
    assert model.generate(PROMPT, max_new_tokens=3).shape == (1, 12)  # nothing is left behind


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"position_ids": torch.arange(1, 10)[None]},
        {"past_key_values": DynamicCache()},
        {"no_such_argument": 1},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_the_call_refuses_what_it_cannot_do(model: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFeatureError, match=next(iter(arguments))):
        model(PROMPT, **arguments)


def test_the_call_refuses_inputs_embeds(model: Any) -> None:
    with pytest.raises(UnsupportedFeatureError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_unset_arguments_of_transformers_are_accepted(model: Any) -> None:
    model(PROMPT, output_attentions=False, output_hidden_states=None, position_ids=None, inputs_embeds=None)


@pytest.mark.parametrize(("bad", "named"), [(tiny.VOCAB, "300"), (-1, "-1")], ids=["too large", "negative"])
def test_ids_out_of_range_are_refused(model: Any, bad: int, named: str) -> None:
    ids = PROMPT.clone()
    ids[0, 4] = bad
    with pytest.raises(InputError, match=f"token id {named} "):
        model(ids)
    with pytest.raises(InputError, match=f"token id {named} "):
        model.generate(ids, max_new_tokens=2)


def test_padding_may_hold_any_id(model: Any) -> None:
    inputs = left_padded()
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -1)
    expected = model(**inputs).logits
    assert torch.equal(model(ids, attention_mask=inputs["attention_mask"]).logits, expected)


def test_sequences_longer_than_the_context_are_refused(model: Any) -> None:
    ids = tiny.token_ids(tiny.MAX_POSITIONS + 1)[None]
    assert model(ids[:, :-1]).logits.shape[1] == tiny.MAX_POSITIONS
    with pytest.raises(InputError, match="65 tokens is longer than the model's context of 64"):
        model(ids)
    with pytest.raises(InputError, match="context of 64"):
        model.generate(ids[:, :60], max_new_tokens=10, eos_token_id=None)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": PROMPT[0]}, "input_ids"),
        ({"input_ids": PROMPT[:, :0]}, "no tokens"),
        ({"input_ids": PROMPT, "attention_mask": torch.zeros(1, 9)}, "no tokens"),
        ({"input_ids": PROMPT, "attention_mask": torch.ones(1, 5)}, "attention_mask"),
        ({"input_ids": PROMPT, "attention_mask": torch.ones(2, 9)}, "attention_mask"),
        ({"input_ids": PROMPT, "attention_mask": torch.ones(1, 1, 9, 9)}, "attention_mask"),
        ({"input_ids": PROMPT, "attention_mask": torch.ones(1, 12)}, "attention_mask"),
        ({"input_ids": PROMPT, "labels": PROMPT[:, :5]}, "labels"),
    ],
    ids=["none", "1-d", "empty", "all masked", "short mask", "mask of 2", "4-d mask", "long mask", "short labels"],
)
def test_inputs_that_do_not_fit_are_refused(model: Any, inputs: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        model(**inputs)


def test_accelerating_shares_the_weights_and_changes_nothing() -> None:
    reference = tiny.from_config(tiny.CONFIGS["gpt2"]())
    before = reference(PROMPT).logits.clone()
    forwards = [type(module).forward for module in reference.modules()]
    model = quicksilver.accelerate(reference, HALTING)
    model.generate(PROMPT, max_new_tokens=5)
    ours = dict(model.named_parameters())
    assert len(ours) == len(list(reference.parameters()))
    for name, parameter in reference.named_parameters():
        assert ours[f"model.{name}"].data_ptr() == parameter.data_ptr()
    assert forwards == [type(module).forward for module in reference.modules()]
    assert torch.equal(reference(PROMPT).logits, before)
    assert reference.config.use_cache is True


def test_a_weight_changed_later_is_seen() -> None:
    reference = tiny.from_config(tiny.CONFIGS["llama"]())
    model = quicksilver.accelerate(reference)
    with torch.no_grad():
        reference.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(model(PROMPT).logits, reference(PROMPT).logits, atol=ATOL, rtol=0)


def test_accelerating_twice_does_not_nest(model: Any) -> None:
    again = quicksilver.accelerate(model, HALTING)
    assert again.model is model.model
    assert again.plan == HALTING
    assert model.plan.is_dense


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_the_dtype_may_be_chosen(tiny_model_dir: Callable[[str], Path], dtype: Any) -> None:
    model = quicksilver.load(tiny_model_dir("qwen3"), HALTING, dtype=dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert model.dtype == expected
    assert model(PROMPT).logits.dtype == expected


def test_the_model_may_be_cast_after_acceleration() -> None:
    model = quicksilver.accelerate(tiny.from_config(tiny.CONFIGS["llama"]())).to(torch.float64)
    assert model(PROMPT).logits.dtype == torch.float64
    assert model.generate(PROMPT, max_new_tokens=3).shape[1] > PROMPT.shape[1]


@pytest.mark.parametrize("give", ["value", "name", "file"])
def test_a_plan_is_a_value_a_preset_or_a_file(tmp_path: Path, give: str) -> None:
    plan = Plan.preset("settled")
    plan.save(tmp_path / "saved.json")
    given = {"value": plan, "name": "settled", "file": tmp_path / "saved.json"}[give]
    assert quicksilver.accelerate(tiny.model("gpt2"), given).plan == plan


def test_the_plan_may_be_changed(model: Any) -> None:
    dense = model(PROMPT).logits
    model.plan = HALTING
    assert model.plan == HALTING
    assert not torch.allclose(model(PROMPT).logits, dense, atol=ATOL, rtol=0)
    model.plan = Plan.dense()
    assert torch.equal(model(PROMPT).logits, dense)


def test_the_plan_may_be_changed_by_name_or_file(model: Any, tmp_path: Path) -> None:
    HALTING.save(tmp_path / "saved.json")
    model.plan = tmp_path / "saved.json"
    assert model.plan == HALTING
    model.plan = "settled"
    assert model.plan == Plan.preset("settled")
    with pytest.raises(PlanError, match="neither a preset"):
        model.plan = "nonesuch"
    with pytest.raises(PlanError, match="not int"):
        model.plan = 3
    assert model.plan == Plan.preset("settled")


def test_widths_on_plain_weights_say_the_python_call(tiny_model_dir: Callable[[str], Path]) -> None:
    folder, plain = tiny_model_dir("llama"), tiny.model("llama")
    model = quicksilver.accelerate(plain)
    way = r"quicksilver\.load\(FOLDER, plan=\.\.\.\) quantizes them in memory"
    with pytest.raises(PlanError, match=way):
        quicksilver.accelerate(plain, "uniform-8bit")
    with pytest.raises(PlanError, match=way):
        model.plan = "uniform-8bit"
    assert quicksilver.load(folder, plan="uniform-8bit").plan.name == "uniform-8bit"
    for way_in in (
        lambda: quicksilver.accelerate(plain, "channel-5bit"),
        lambda: quicksilver.load(folder, "channel-5bit"),
    ):
        with pytest.raises(PlanError, match=r"plan fit MODEL PLAN -o FILE\.json` writes a plan file"):
            way_in()


def test_a_plan_that_does_not_fit_is_refused_and_the_old_one_stays(model: Any) -> None:
    misfit = Plan.from_dict({"version": 2, "halting": {"rule": {"type": "drift", "threshold": [1.0, 2.0]}}})
    with pytest.raises(PlanError, match="2 thresholds, the model has 4 layers"):
        model.plan = misfit
    assert model.plan.is_dense


def test_stats_of_a_call() -> None:
    model = quicksilver.accelerate(tiny.model("llama"), HALTING)
    model(PROMPT)
    depths = [(1, 3, 2, 4)[i % 4] for i in range(9)]
    assert model.stats.tokens == 9
    assert model.stats.num_layers == 4
    assert model.stats.mean_depth == pytest.approx(sum(depths) / 9)
    assert model.stats.halted_by_layer == (depths.count(1), depths.count(2), depths.count(3), 0)
    assert model.stats.flops < model.stats.dense_flops
    assert model.stats.kv_entries == sum(depths)
    model(PROMPT[:, :4])
    assert model.stats.tokens == 4  # each call starts anew


def test_stats_of_a_generation_count_all_its_passes() -> None:
    model = quicksilver.accelerate(tiny.model("gpt2"), halting_plan(ForcedRule((2,))))
    generated = model.generate(**left_padded(), max_new_tokens=6, min_new_tokens=6)
    fed = 9 + 5 + 1 + 3 * 5  # the last new token of each row is not fed
    assert generated.shape == (3, 15)
    assert model.stats.tokens == fed
    assert model.stats.mean_depth == 2.0
    assert model.stats.halted_by_layer == (0, fed, 0, 0)
    assert 0.0 < model.stats.flops_reduction < 1.0
    assert "mean depth      2.00 of 4 layers" in model.stats.summary()


def test_stats_of_a_dense_run_save_nothing(model: Any) -> None:
    model.generate(PROMPT, max_new_tokens=4)
    assert model.stats.flops == model.stats.dense_flops
    assert model.stats.flops_reduction == 0.0
    assert model.stats.mean_depth == 4.0


def test_the_engine_follows_the_model_to_another_dtype() -> None:
    model = quicksilver.accelerate(tiny.from_config(tiny.CONFIGS["llama"]()))
    ids = tiny.token_ids(8)[None]
    assert model(ids).logits.dtype == torch.float32
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model(ids).logits.dtype == torch.bfloat16
