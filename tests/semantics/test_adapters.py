"""Adapters of PEFT run as they do in transformers, switched on and off between calls, or are refused by reason."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import quicksilver
from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.families.quantize import quantize_model
from quicksilver.plan import Plan
from quicksilver.rules import DropFill, ForcedRule, PropagateFill, Shortcut, ZeroFill
from quicksilver.weights.config import LAYERS_ONLY
from tests import tiny, tolerances
from tests.engines import halting_plan, shortcut_plan

peft = pytest.importorskip("peft")

IDS = tiny.token_ids(12)[None]
MAPS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gemma2": ["q_proj", "v_proj", "down_proj"],
}
NORMS = {name: ["ln_1", "ln_f"] if name == "gpt2" else ["input_layernorm", "norm"] for name in MAPS}
TABLES = {name: ["wte" if name == "gpt2" else "embed_tokens", "lm_head"] for name in MAPS}


def lora(targets: list[str], **options: Any) -> Any:
    return peft.LoraConfig(target_modules=targets, r=4, **options)


def drawn(model: Any, seed: int = 1) -> Any:
    """Return a model with adapters in it, their weights drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    marks = ("lora_", "ia3_", "ln_tuning", "modules_to_save", "trainable_tokens")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(mark in name for mark in marks):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def fresh(family: str) -> Any:
    return tiny.from_config(tiny.CONFIGS[family]())


def adapted(family: str, config: Any = None) -> Any:
    return drawn(peft.get_peft_model(fresh(family), config or lora(MAPS[family])))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_same(accelerated: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(accelerated(IDS).logits, wanted, atol=tolerances.LOGITS[torch.float32], rtol=0)


CONFIGS: dict[str, Callable[[str], Any]] = {
    "lora": lambda family: lora(MAPS[family]),
    "dora": lambda family: lora(MAPS[family], use_dora=True),
    "ia3": lambda family: peft.IA3Config(target_modules=MAPS[family][:2], feedforward_modules=[]),
    "tables": lambda family: lora(TABLES[family]),
    "saved head": lambda family: lora(MAPS[family][:1], modules_to_save=["lm_head"]),
    "tokens": lambda family: lora(MAPS[family][:1], trainable_token_indices=IDS[0, :3].tolist()),
    "norms": lambda family: peft.LNTuningConfig(target_modules=NORMS[family]),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", MAPS)
def test_adapters_run_as_in_transformers(family: str, name: str) -> None:
    model = adapted(family, CONFIGS[name](family))
    assert not torch.allclose(logits(model), logits(fresh(family)), atol=1e-2)
    assert_same(quicksilver.accelerate(model), logits(model))


@pytest.mark.parametrize("family", MAPS)
def test_plans_do_with_adapters_what_they_do_with_merged_weights(family: str) -> None:
    model = adapted(family)
    merged = copy.deepcopy(model).merge_and_unload()
    halting = ForcedRule(tuple(1 + position % 4 for position in range(IDS.shape[1])))
    plans = [halting_plan(halting, fill) for fill in (PropagateFill(), DropFill(), ZeroFill())]
    plans.append(shortcut_plan(*(Shortcut(layer_idx, "attention", threshold=1.0) for layer_idx in range(3))))
    for plan in plans:
        wanted = quicksilver.accelerate(merged, plan)(IDS).logits
        assert not torch.allclose(wanted, logits(merged), atol=1e-2)
        assert_same(quicksilver.accelerate(model, plan), wanted)


@pytest.mark.parametrize("family", MAPS)
def test_adapters_are_switched_between_calls(family: str) -> None:
    base = fresh(family)
    accelerated, plain = quicksilver.accelerate(base), logits(base)
    assert_same(accelerated, plain)
    model = drawn(peft.get_peft_model(base, lora(MAPS[family])))  # into the same modules
    model.add_adapter("other", lora(MAPS[family][1:]))
    drawn(model, seed=2)
    wrapped = quicksilver.accelerate(model)
    seen = [plain]
    for switch in (lambda: None, lambda: model.set_adapter("other"), model.merge_adapter, model.unmerge_adapter):
        switch()
        seen.append(logits(model))
        for each in (accelerated, wrapped):
            assert_same(each, seen[-1])
    assert not any(torch.allclose(*pair, atol=1e-2) for pair in [seen[:2], seen[1:3]])
    with model.disable_adapter():
        assert_same(wrapped, plain)
    whole = model.merge_and_unload()
    for each in (accelerated, wrapped):
        assert_same(each, logits(whole))
        assert torch.equal(each.generate(IDS, max_new_tokens=4), whole.generate(IDS, max_new_tokens=4))


def test_adapters_that_transformers_puts_in_run_too() -> None:
    model = fresh("llama")
    accelerated = quicksilver.accelerate(model)
    model.add_adapter(lora(MAPS["llama"]))
    drawn(model)
    assert_same(accelerated, logits(model))
    assert_same(quicksilver.accelerate(model), logits(model))


def test_an_accelerated_model_with_adapters_is_copied_with_them() -> None:
    accelerated = quicksilver.accelerate(adapted("llama"))
    wanted = accelerated(IDS).logits
    for copied in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
        assert torch.equal(copied(IDS).logits, wanted)


OPTIONS: dict[str, Any] = {"task_type": "CAUSAL_LM"}
REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "prompt": ("PROMPT_TUNING", lambda: peft.PromptTuningConfig(num_virtual_tokens=2, **OPTIONS)),
    "prefix": ("PREFIX_TUNING", lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, **OPTIONS)),
    "activated": ("LORA", lambda: lora(["q_proj"], alora_invocation_tokens=[1], **OPTIONS)),
    "regularized": ("AdaLoraModel", lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9)),
    "in attention": ("AdaptionPrompt", lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2, **OPTIONS)),
    "saved module": (r"layers\.0\.mlp", lambda: lora(["q_proj"], modules_to_save=["mlp"])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_modules_is_refused_by_reason(name: str) -> None:
    reason, config = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=f"{reason}.* would not run"):
        quicksilver.accelerate(peft.get_peft_model(fresh("llama"), config()))


def test_hooks_on_the_wrapper_are_refused_by_name() -> None:
    model = adapted("llama")
    accelerated = quicksilver.accelerate(model)
    for module, name in ((model, "the model"), (model.base_model, "base_model")):
        hook = module.register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedModelError, match=f"'{name}'"):
            accelerated(IDS)
        hook.remove()
    assert_same(accelerated, logits(model))


@pytest.mark.parametrize("family", MAPS)
def test_a_model_is_not_quantized_past_its_adapters(family: str) -> None:
    model = adapted(family).base_model.model
    with pytest.raises(ModelError, match="merge adapters"):
        quantize_model(model, LAYERS_ONLY)


def test_plain_and_adapted_models_cost_the_same_multiply_adds() -> None:
    """What adapters multiply is not counted; the pages say so."""
    counts = []
    for model in (fresh("llama"), adapted("llama")):
        accelerated = quicksilver.accelerate(model, Plan.dense())
        accelerated(IDS)
        counts.append(accelerated.stats.flops)
    assert counts[0] == counts[1]
