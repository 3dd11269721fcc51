"""With compiled kernels the engine gives what its definition gives, as far as their rounding lets it differ.

What one product may be off by is tested in `tests/ops`; here it has gone through every layer of a model with random
weights, which are rougher than a trained model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from quicksilver.backends.native import NativeBackend
from quicksilver.families.kernels import norm_operands
from quicksilver.families.quantize import quantize_model
from quicksilver.families.registry import adapt
from quicksilver.loading.load import accelerate
from quicksilver.ops import any_precision_linear, native
from quicksilver.plan import Plan
from quicksilver.rules import ChannelBitsRule, EntropyBitsRule, UniformBitsRule
from quicksilver.weights.config import QuantizationConfig
from tests import tiny, tolerances
from tests.engines import Run, decoder, precision_plan, run_batch, run_chunks, run_steps, run_whole
from tests.ops.any_precision import draw

pytestmark = [
    pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels"),
    pytest.mark.usefixtures("rounding_as_kernels"),
]

PLANS = {
    "dense": Plan.dense(),
    "uniform": precision_plan(UniformBitsRule(4)),
    "by token": precision_plan(EntropyBitsRule((7.1, 6.6), layer=2)),
}
CHANNEL = precision_plan(ChannelBitsRule((3.0, 1.5, 0.7, 0.3), bits=(8, 6, 4, 2, 0)))
ATOL = tolerances.KERNEL_LOGITS


def close(one: Run, other: Run, atol: float = ATOL) -> None:
    torch.testing.assert_close(one.logits, other.logits, atol=atol, rtol=0)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_however_tokens_are_fed_the_definition_is_met(family: str, name: str) -> None:
    model, plan, ids = tiny.quantized(family), PLANS[name], tiny.token_ids(30)
    definition, engine = decoder(model, plan), decoder(model, plan, kernels="native")
    whole = run_whole(definition, ids)
    for fed in (run_whole(engine, ids), run_steps(engine, ids), run_chunks(engine, ids, [9, 16, 5])):
        close(fed, whole)
        assert not torch.equal(fed.logits, whole.logits)  # they were used
        assert fed.trace.macs_by_bits == whole.trace.macs_by_bits


@pytest.mark.parametrize("plan", [PLANS["uniform"], CHANNEL], ids=["uniform", "channel"])
def test_a_prompt_runs_through_all_layers_in_one_call(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run, seen = decoder(tiny.quantized("llama"), plan, kernels="native"), NativeBackend.run, []

    def counted(self: NativeBackend, layers: range, *args: Any) -> Any:
        seen.append(layers)
        return run(self, layers, *args)

    monkeypatch.setattr(NativeBackend, "run", counted)
    run_whole(engine, tiny.token_ids(30))
    assert seen == [range(engine.spec.num_layers)]


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_widths_that_depend_on_activations_lose_as_much(family: str) -> None:
    """An activation that lies on a threshold may fall to either side, so logits differ, and losses hardly do."""
    model, ids = tiny.quantized(family), tiny.token_ids(60)
    losses, macs = [], []
    for run in (run_whole(decoder(model, CHANNEL), ids), run_steps(decoder(model, CHANNEL, kernels="native"), ids)):
        losses.append(float(torch.nn.functional.cross_entropy(run.logits[:-1], ids[1:])))
        macs.append(torch.tensor(run.trace.macs_by_bits, dtype=torch.float64))
    assert losses[0] == pytest.approx(losses[1], abs=tolerances.KERNEL_LOSS)
    assert float((macs[0] - macs[1]).abs().max()) < tolerances.KERNEL_COST * float(macs[0].sum())


@pytest.mark.parametrize("plan", [PLANS["uniform"], CHANNEL], ids=["uniform", "channel"])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_later_tokens_change_nothing(family: str, plan: Plan) -> None:
    engine, ids, changed = (
        decoder(tiny.quantized(family), plan, kernels="native"),
        tiny.token_ids(24),
        tiny.token_ids(24),
    )
    changed[12:] = tiny.token_ids(12, seed=5)
    assert torch.equal(run_steps(engine, ids).logits[:12], run_steps(engine, changed).logits[:12])
    assert torch.equal(run_whole(engine, ids[:14]).logits[:12], run_whole(engine, changed[:14]).logits[:12])


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_batch_is_its_sequences_alone(family: str) -> None:
    engine = decoder(tiny.quantized(family), PLANS["uniform"], kernels="native")
    sequences = [tiny.token_ids(n, seed=n) for n in (5, 1, 9)]
    alone = torch.cat([run_whole(engine, each).logits for each in sequences])
    torch.testing.assert_close(run_batch(engine, sequences).logits, alone, atol=ATOL, rtol=0)


def test_a_quantized_head_is_read_by_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.from_config(tiny.CONFIGS["llama"]())
    quantize_model(model, QuantizationConfig(embeddings=False))
    seen, run = [], any_precision_linear.multiply

    def multiply(x: Tensor, matrix: Any, **rest: Any) -> Tensor:
        seen.append((matrix.num_outputs, rest["norm"] is not None))
        return run(x, matrix, **rest)

    monkeypatch.setattr("quicksilver.families.kernels.multiply", multiply)
    ids = tiny.token_ids(3)
    close(run_steps(decoder(model, Plan.dense(), kernels="native"), ids), run_whole(decoder(model, Plan.dense()), ids))
    assert seen == [(tiny.VOCAB, True)]


@pytest.mark.parametrize("family", tiny.LAYOUTS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_head_norms_its_rows_as_the_norm_does(family: str, rows: int) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]())
    quantize_model(model, QuantizationConfig(embeddings=False))
    adapter = adapt(model, "native")
    hidden = draw(rows, adapter.spec.hidden_size)
    torch.testing.assert_close(adapter.logits(hidden), adapter.head(adapter.final_norm(hidden)), atol=ATOL, rtol=0)
    assert adapter.normed_head is not None


def strided(tensor: Tensor) -> Tensor:
    """Return the same numbers, every second of twice as many."""
    return torch.stack((tensor, torch.full_like(tensor, 9.0)), dim=-1)[..., 0]


ODD_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": Tensor.double,
    "bfloat16": Tensor.bfloat16,
    "strided": strided,
}


@pytest.mark.parametrize("odd", ODD_NORMS)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_kernels_take_norms_of_contiguous_float32_alone(name: str, odd: str) -> None:
    norm = nn.LayerNorm(8)
    operands = norm_operands(norm)
    assert operands is not None
    assert (operands.weight is norm.weight, operands.bias is norm.bias, operands.epsilon) == (True, True, norm.eps)
    setattr(norm, name, nn.Parameter(ODD_NORMS[odd](getattr(norm, name).detach())))
    assert norm_operands(norm) is None
    by_root = LlamaRMSNorm(8)
    by_root.weight = norm.weight
    assert (norm_operands(by_root) is None) == (name == "weight")
    assert norm_operands(nn.LayerNorm(8, bias=False)) is None
    assert norm_operands(nn.BatchNorm1d(8)) is None


@pytest.mark.parametrize("place", ["layer", "last"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_norm_that_is_not_contiguous_is_run_by_pytorch(name: str, place: str) -> None:
    model = tiny.from_config(tiny.CONFIGS["gpt2"]())
    quantize_model(model, QuantizationConfig(embeddings=False))
    norm = model.transformer.h[1].ln_2 if place == "layer" else model.transformer.ln_f
    setattr(norm, name, nn.Parameter(strided(getattr(norm, name).detach())))
    runs = [run_steps(decoder(model, Plan.dense(), kernels=each), tiny.token_ids(9)) for each in ("native", "torch")]
    close(*runs)


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_head_leaves_gradients_of_its_norm_to_pytorch(family: str) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]())
    quantize_model(model, QuantizationConfig(embeddings=False))
    adapter = adapt(model, "native")
    adapter.logits(draw(2, adapter.spec.hidden_size)).sum().backward()
    weight = cast(torch.nn.Module, adapter.final_norm).weight
    assert weight.grad is not None


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_generation_gives_the_same_tokens(family: str) -> None:
    ids = tiny.token_ids(8)[None]
    made = [
        accelerate(tiny.quantized(family), PLANS["uniform"], kernels=kernels).generate(ids, max_new_tokens=20)
        for kernels in ("torch", "native")
    ]
    assert torch.equal(*made)
