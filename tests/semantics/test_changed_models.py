"""What becomes of a model, a cache or a trace while compiled kernels hold on to it: converted, written to, copied."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import quicksilver
from quicksilver.errors import InputError, UnsupportedModelError
from quicksilver.families.cost import executed_cost
from quicksilver.families.quantize import quantize_model
from quicksilver.families.rotary import Rotation
from quicksilver.ops import native
from quicksilver.ops.native import KernelChoice
from quicksilver.plan import Plan
from quicksilver.rules import ChannelBitsRule, KVConfig
from quicksilver.weights import AnyPrecisionLinear
from quicksilver.weights.config import LAYERS_ONLY
from tests import tiny, tolerances
from tests.engines import decoder, precision_plan, run_steps

pytestmark = [
    pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels"),
    pytest.mark.usefixtures("rounding_as_kernels"),
]

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.deepcopy,
    "pickle": lambda held: pickle.loads(pickle.dumps(held)),
}


def quantized(family: str = "llama", seed: int = 0) -> Any:
    """Return a quantized model that a test may change."""
    model = tiny.from_config(tiny.CONFIGS[family](), seed)
    quantize_model(model, LAYERS_ONLY)
    return model


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_model_converted_underneath_is_read_anew(family: str) -> None:
    model, ids = quantized(family), tiny.token_ids(9)[None]
    accelerated = quicksilver.accelerate(model)
    cache, engine = accelerated(ids).past_key_values, accelerated.decoder
    model.bfloat16()
    with pytest.raises(InputError, match="written by another model"):
        accelerated(ids, past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="accelerate it again"):
        run_steps(engine, ids[0])
    assert accelerated.dtype == torch.bfloat16
    assert torch.equal(accelerated(ids).logits, quicksilver.accelerate(model)(ids).logits)


def test_rotations_of_another_size_are_not_read_as_heads() -> None:
    """PyTorch refuses them; the kernels would read past their end."""
    engine = decoder(quantized(), Plan.dense(), kernels="native")
    (rotate,) = engine.adapter.rotations

    def halved(positions: torch.Tensor) -> Rotation:
        rotation = rotate(positions)
        return Rotation(rotation.cos[..., ::2].contiguous(), rotation.sin[..., ::2].contiguous())

    engine.adapter = replace(engine.adapter, rotations=(halved,))
    with pytest.raises(RuntimeError, match="size of tensor"):
        run_steps(engine, tiny.token_ids(4))


def parts(model: Any) -> dict[str, nn.Module]:
    """Return modules of a Llama whose dtype the states or rotations follow."""
    return {"embedding": model.model.embed_tokens, "final norm": model.model.norm}


@pytest.mark.parametrize("name", ["embedding", "final norm"])
def test_models_of_several_dtypes_are_run_as_they_are_defined(name: str) -> None:
    ids, logits = tiny.token_ids(9)[None], []
    for kernels in ("torch", "native"):
        model = quantized()
        accelerated = quicksilver.accelerate(model, kernels=kernels)
        parts(model)[name].bfloat16()
        logits.append(accelerated(ids).logits)
    torch.testing.assert_close(*logits, atol=tolerances.KERNEL_LOGITS, rtol=0)


CHANNEL = precision_plan(ChannelBitsRule((3.0, 1.5, 0.7, 0.3), bits=(8, 6, 4, 2, 0)))


def write_codes(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, AnyPrecisionLinear):
            module.get_buffer("high")[::3] ^= 0b01


def write_norms(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.mul_(1.3)


def convert_layers(model: Any) -> None:
    body = model.base_model
    for layer in body.h if model.config.model_type == "gpt2" else body.layers:
        layer.bfloat16().float()


CHANGES: dict[str, Callable[[Any], object]] = {
    "codes": write_codes,
    "norms": write_norms,
    "all": lambda model: model.load_state_dict(quantized(model.config.model_type, seed=1).state_dict()),
    "assigned": lambda model: model.load_state_dict(quantized(model.config.model_type, 1).state_dict(), assign=True),
    "converted": convert_layers,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("plan", [Plan.dense(), CHANNEL], ids=["dense", "channel"])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_the_next_sequence_is_run_with_what_weights_have_become(family: str, plan: Plan, name: str) -> None:
    model, ids = quantized(family), tiny.token_ids(9)[None]
    accelerated = quicksilver.accelerate(model, plan, kernels="native")
    before = accelerated(ids).logits
    CHANGES[name](model)
    after = accelerated(ids).logits
    assert not torch.equal(after, before)
    assert torch.equal(after, quicksilver.accelerate(copy.deepcopy(model), plan, kernels="native")(ids).logits)


def test_weights_that_have_not_changed_are_not_packed_again() -> None:
    engine = decoder(tiny.quantized("llama"), Plan.dense(), kernels="native")
    backend = engine.backend
    run_steps(engine, tiny.token_ids(4))
    assert engine.backend is backend


@pytest.mark.parametrize("entry_bits", [None, 16, 8])
@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_cache_goes_a_way_of_its_own(copied: str, entry_bits: int | None) -> None:
    engine = decoder(tiny.quantized("llama"), Plan("test", kv=KVConfig(bits=entry_bits)), kernels="native")
    shared, ways = tiny.token_ids(6), (tiny.token_ids(5, seed=1), tiny.token_ids(5, seed=2))
    wanted = [run_steps(engine, torch.cat((shared, way))).logits[6:] for way in ways]
    first, trace = run_steps(engine, shared).cache, engine.new_trace()
    second, found = COPIES[copied](first), ([], [])
    for tokens in zip(*ways, strict=True):
        for token, cache, hidden in zip(tokens, (first, second), found, strict=True):
            hidden.append(engine.run(token[None], [1], cache, trace))
    for hidden, logits in zip(found, wanted, strict=True):
        made = engine.logits(torch.cat(hidden), trace)
        torch.testing.assert_close(made, logits, atol=tolerances.LOGITS[torch.float32], rtol=0)


def test_what_ran_in_inference_mode_is_counted_outside() -> None:
    accelerated, ids = quicksilver.accelerate(tiny.quantized("llama"), kernels="native"), tiny.token_ids(9)[None]
    with torch.no_grad():
        accelerated(ids)
        wanted = accelerated.stats
    with torch.inference_mode():
        accelerated(ids)
    assert accelerated.stats == wanted
    assert accelerated.stats == wanted


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_trace_has_what_was_counted_and_counts_on_alone(copied: str) -> None:
    engine, ids = decoder(tiny.quantized("llama"), Plan.dense(), kernels="native"), tiny.token_ids(8)
    run = run_steps(engine, ids)
    second = COPIES[copied](run.trace)
    engine.run(ids[:1], [1], run.cache, run.trace)
    assert [layer.query_rows for layer in second.layers] == [8] * 4
    assert [layer.query_rows for layer in run.trace.layers] == [9] * 4
    assert executed_cost(engine.spec, second) == executed_cost(engine.spec, run_steps(engine, ids).trace)


def test_a_trace_keeps_no_backend() -> None:
    engine = decoder(tiny.quantized("llama"), Plan.dense(), kernels="native")
    trace, backend = run_steps(engine, tiny.token_ids(8)).trace, weakref.ref(engine.backend)
    del engine
    gc.collect()
    assert backend() is None
    assert trace.layers[0].query_rows == 8


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_copied_model_is_the_same_and_reads_its_own_weights(family: str, kernels: KernelChoice, copied: str) -> None:
    accelerated, ids = quicksilver.accelerate(quantized(family), CHANNEL, kernels=kernels), tiny.token_ids(9)[None]
    wanted = accelerated(ids).logits
    second = COPIES[copied](accelerated)
    with torch.no_grad():
        for tensor in (*accelerated.parameters(), *accelerated.buffers()):
            tensor.zero_()
    assert torch.equal(second(ids).logits, wanted)
