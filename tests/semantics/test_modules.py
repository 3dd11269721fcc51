"""What users hang on a model's modules, or put in their place, runs or is refused by name; nothing is left out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

import quicksilver
from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.families.quantize import quantize_model
from quicksilver.ops import native
from quicksilver.plan import Plan
from quicksilver.weights.config import LAYERS_ONLY, QuantizationConfig
from tests import tiny, tolerances
from tests.engines import decoder, run_steps

pytestmark = pytest.mark.usefixtures("rounding_as_kernels")  # of quantized maps, where PyTorch runs them

IDS = tiny.token_ids(9)[None]
RUN = {
    "gpt2": ("", "transformer", "transformer.h.1", "transformer.h.1.attn", "transformer.h.1.mlp", "transformer.drop"),
    "llama": ("", "model", "model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp", "model.rotary_emb"),
}
CALLED = {
    "gpt2": ("transformer.wpe", "transformer.h.1.ln_2", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.act"),
    "qwen3": ("model.embed_tokens", "model.layers.1.self_attn.k_norm", "model.layers.1.mlp.up_proj", "model.norm"),
}
ALL_RUN = [(family, path) for family, paths in RUN.items() for path in paths]
ALL_CALLED = [(family, path) for family, paths in CALLED.items() for path in (*paths, "lm_head")]


def half_more(output: Any) -> Any:
    return output * 1.5 if isinstance(output, torch.Tensor) and output.is_floating_point() else output


def other_input(x: torch.Tensor) -> torch.Tensor:
    return x.sigmoid() if x.is_floating_point() else x // 2


def replace_forward(module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: half_more(forward(*args, **kwargs))


HANGERS: dict[str, Callable[[Any], Any]] = {
    "hook": lambda module: module.register_forward_hook(lambda _, args, output: half_more(output)),
    "keyword hook": lambda module: module.register_forward_hook(lambda _, a, k, y: half_more(y), with_kwargs=True),
    "pre-hook": lambda module: module.register_forward_pre_hook(lambda _, args: tuple(map(other_input, args))),
    "forward": replace_forward,
}


def fresh(family: str, quantized: bool = False) -> Any:
    """Return a model that a test may change."""
    model = tiny.from_config(tiny.CONFIGS[family]())
    if quantized:
        quantize_model(model, QuantizationConfig(embeddings=False))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_as_transformers(accelerated: Any, model: Any, atol: float = tolerances.LOGITS[torch.float32]) -> None:
    torch.testing.assert_close(accelerated(IDS).logits, logits(model), atol=atol, rtol=0)


@pytest.mark.parametrize("hang", HANGERS.values(), ids=HANGERS)
@pytest.mark.parametrize(("family", "path"), ALL_RUN)
def test_what_would_not_run_is_refused_when_a_model_is_taken_and_later(
    family: str, path: str, hang: Callable[[Any], Any]
) -> None:
    model = fresh(family)
    accelerated, named = quicksilver.accelerate(model), path or "the model"
    accelerated(IDS)
    hung = hang(model.get_submodule(path))
    for run in (quicksilver.accelerate, lambda _: accelerated(IDS), lambda _: accelerated.generate(IDS)):
        with pytest.raises(UnsupportedModelError, match=f"'{named}'.* would not run"):
            run(model)
    if hung is None:
        del model.get_submodule(path).forward
    else:
        hung.remove()
    assert_as_transformers(accelerated, model)


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
@pytest.mark.parametrize("hang", HANGERS.values(), ids=HANGERS)
@pytest.mark.parametrize(("family", "path"), ALL_CALLED)
def test_what_hangs_on_called_modules_runs(family: str, path: str, hang: Callable[[Any], Any], quantized: bool) -> None:
    model, atol = fresh(family, quantized), tolerances.KERNEL_LOGITS if quantized else tolerances.LOGITS[torch.float32]
    accelerated, before = quicksilver.accelerate(model), logits(model)
    assert_as_transformers(accelerated, model, atol)
    hang(model.get_submodule(path))
    after = logits(model)
    assert float((after - before).abs().max()) > 3 * atol
    for each in (accelerated, quicksilver.accelerate(model)):
        assert_as_transformers(each, model, atol)
        engine, cache, trace = each.decoder, each.decoder.new_cache(1), each.decoder.new_trace()
        steps = torch.cat([engine.run(token[None], [1], cache, trace) for token in IDS[0]])
        torch.testing.assert_close(engine.logits(steps, trace), after[0], atol=atol, rtol=0)


@pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")
def test_kernels_run_whole_layers_again_once_a_hook_is_gone() -> None:
    engine = decoder(fresh("llama", quantized=True), Plan.dense(), kernels="native")
    wanted, calls = run_steps(engine, IDS[0]).logits, []
    hook = engine.adapter.layers[1].quantized[0].register_forward_hook(lambda *_: calls.append(1))
    run_steps(engine, IDS[0])
    assert len(calls) == IDS.shape[1]
    hook.remove()
    assert torch.equal(run_steps(engine, IDS[0]).logits, wanted)
    assert len(calls) == IDS.shape[1]


def test_a_hook_on_a_projection_that_quantized_weights_have_split_is_refused() -> None:
    model = fresh("gpt2", quantized=True)
    HANGERS["hook"](model.transformer.h[2].attn.c_attn)
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.2\.attn\.c_attn"):
        quicksilver.accelerate(model)


def test_a_hook_registered_while_tokens_are_generated_is_refused() -> None:
    model = fresh("llama")
    accelerated, seen = quicksilver.accelerate(model), []

    class Streamer:
        def put(self, tokens: torch.Tensor) -> None:
            seen.append(tokens)
            if len(seen) == 3:
                HANGERS["hook"](model.model.layers[2])

        def end(self) -> None: ...

    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2"):
        accelerated.generate(IDS, max_new_tokens=9, eos_token_id=None, streamer=Streamer())
    assert len(seen) == 3


class OwnLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 1.5 * super().forward(*args, **kwargs)


class SameLayer(modeling_llama.LlamaDecoderLayer):
    """Another class, the same forward."""


class OwnCall(modeling_llama.LlamaMLP):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 1.5 * super().__call__(*args, **kwargs)


def set_class(path: str, cls: type) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_submodule(path).__class__ = cls

    return change


def with_bias(size: int, num_outputs: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(size, num_outputs)


REFUSED: dict[str, Callable[[Any], None]] = {
    "model.layers.1": set_class("model.layers.1", OwnLayer),
    "model.layers.2.mlp": set_class("model.layers.2.mlp", OwnCall),
    "model.layers.3": lambda model: model.set_submodule("model.layers.3", torch.compile(model.model.layers[3])),
    "the model": lambda model: setattr(model, "forward", torch.compile(model.forward)),
    "2 layers": lambda model: setattr(model.model, "layers", model.model.layers[:2]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_forwards_of_other_classes_are_refused_by_name(name: str) -> None:
    model = fresh("llama")
    accelerated = quicksilver.accelerate(model)
    REFUSED[name](model)
    for run in (lambda: accelerated(IDS), lambda: quicksilver.accelerate(model)):
        with pytest.raises(UnsupportedModelError, match=name):
            run()


def other(model: Any) -> Any:
    return tiny.from_config(model.config, seed=1)


FOLLOWED: dict[str, tuple[str, Callable[[Any], None]]] = {
    "class": ("llama", set_class("model.layers.1", SameLayer)),
    "map": ("llama", lambda model: model.set_submodule("model.layers.1.self_attn.q_proj", with_bias(32, 32))),
    "norm": ("llama", lambda model: model.set_submodule("model.layers.1.input_layernorm", nn.LayerNorm(32))),
    "final norm": ("llama", lambda model: model.set_submodule("model.norm", nn.RMSNorm(32))),
    "layer": ("llama", lambda model: model.set_submodule("model.layers.1", other(model).model.layers[1])),
    "head": ("llama", lambda model: model.set_submodule("lm_head", with_bias(32, tiny.VOCAB))),
    "table": ("llama", lambda model: model.set_input_embeddings(nn.Embedding(tiny.VOCAB, 32))),
    "body": ("llama", lambda model: setattr(model, "model", other(model).model)),
    "projection": ("gpt2", lambda model: model.set_submodule("transformer.h.1.attn.c_attn", with_bias(32, 96))),
    "activation": ("gpt2", lambda model: model.set_submodule("transformer.h.1.mlp.act", nn.ReLU())),
    "final norm of gpt2": ("gpt2", lambda model: model.set_submodule("transformer.ln_f", nn.Identity())),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_replaced_modules_run_at_the_next_call(name: str) -> None:
    family, change = FOLLOWED[name]
    model = fresh(family)
    accelerated = quicksilver.accelerate(model)
    engine, before = accelerated.decoder, logits(model)
    accelerated(IDS)
    change(model)
    copied = copy.deepcopy(accelerated)
    with pytest.raises(UnsupportedModelError, match="accelerate it again"):
        engine.run(IDS[0], [IDS.shape[1]], engine.new_cache(1), engine.new_trace())
    for each in (accelerated, copied, quicksilver.accelerate(model)):
        assert_as_transformers(each, model)
    assert name == "class" or not torch.equal(logits(model), before)


def more(function: Any) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        return tuple(map(half_more, output)) if isinstance(output, tuple) else half_more(output)

    return wrapped


@pytest.mark.parametrize(
    ("owner", "name", "reason"),
    [
        (modeling_llama.LlamaAttention, "forward", r"model\.layers\.0\.self_attn"),
        (modeling_llama.LlamaMLP, "forward", r"model\.layers\.0\.mlp"),
        (modeling_llama, "apply_rotary_pos_emb", "apply_rotary_pos_emb"),
        (modeling_llama, "eager_attention_forward", "eager_attention_forward"),
    ],
)
def test_classes_and_functions_of_transformers_patched_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, reason: str
) -> None:
    model = fresh("llama")
    accelerated = quicksilver.accelerate(model)
    monkeypatch.setattr(owner, name, more(getattr(owner, name)))
    for run in (lambda: accelerated(IDS), lambda: quicksilver.accelerate(model)):
        with pytest.raises(UnsupportedModelError, match=f"{reason}.* would not run"):
            run()


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
def test_a_norm_whose_class_is_patched_runs(monkeypatch: pytest.MonkeyPatch, quantized: bool) -> None:
    model = fresh("llama", quantized)
    accelerated = quicksilver.accelerate(model)
    accelerated(IDS)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", more(modeling_llama.LlamaRMSNorm.forward))
    atol = tolerances.KERNEL_LOGITS if quantized else tolerances.LOGITS[torch.float32]
    for each in (accelerated, quicksilver.accelerate(model)):
        assert_as_transformers(each, model, atol)


def own_attention(*args: Any, **kwargs: Any) -> Any:
    output, weights = sdpa_attention_forward(*args, **kwargs)
    return 1.5 * output, weights


@pytest.mark.parametrize("name", ["own", "sdpa"])
def test_attention_that_users_register_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = fresh("llama")
    model.set_attn_implementation("sdpa")
    accelerated = quicksilver.accelerate(model)
    accelerated(IDS)
    monkeypatch.setitem(AttentionInterface._global_mapping, name, own_attention)
    model.set_attn_implementation(name)
    for run in (lambda: accelerated(IDS), lambda: quicksilver.accelerate(model)):
        with pytest.raises(UnsupportedModelError, match=f"attention '{name}'"):
            run()
    model.set_attn_implementation("eager")
    assert_as_transformers(accelerated, model)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_all_modules_are_refused(register: Any) -> None:
    model = fresh("llama")
    accelerated = quicksilver.accelerate(model)
    hook = register(lambda *_: None)
    try:
        for run in (lambda: accelerated(IDS), lambda: quicksilver.accelerate(model)):
            with pytest.raises(UnsupportedModelError, match="on all modules"):
                run()
    finally:
        hook.remove()
    assert_as_transformers(accelerated, model)


def test_what_pytorch_and_transformers_leave_on_modules_is_no_obstacle() -> None:
    model = fresh("llama")
    accelerated = quicksilver.accelerate(model)
    model(IDS, output_hidden_states=True, output_attentions=True)  # hooks that stay, and do nothing from now on
    with FlopCounterMode(display=False):
        accelerated(IDS)
    assert_as_transformers(accelerated, model)
    assert_as_transformers(quicksilver.accelerate(model), model)


def test_a_model_is_not_quantized_past_what_hangs_on_its_maps() -> None:
    model = fresh("llama")
    HANGERS["hook"](model.model.layers[1].mlp.up_proj)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        quantize_model(model, LAYERS_ONLY)


def test_a_map_that_is_not_quantized_among_quantized_ones_is_refused_by_name() -> None:
    model = fresh("llama", quantized=True)
    model.model.layers[2].mlp.up_proj = with_bias(32, 48)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2\.mlp\.up_proj"):
        quicksilver.accelerate(model)
