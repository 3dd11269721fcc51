"""Spans of layers run by the compiled kernels are the layers run one by one by PyTorch: states, entries and counts."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from threading import Thread
from typing import Any

import pytest
import torch

from quicksilver.backends.native import span_ends
from quicksilver.families.cost import Cost, executed_cost
from quicksilver.families.quantize import quantize_model
from quicksilver.ops import native
from quicksilver.plan import Plan
from quicksilver.rules import (
    ChannelBitsRule,
    DropFill,
    EntropyBitsRule,
    ForcedFusionRule,
    ForcedRule,
    KVConfig,
    PropagateFill,
    RelativeDriftRule,
    Shortcut,
    UniformBitsRule,
    ZeroFill,
)
from quicksilver.runtime.loop import Decoder
from quicksilver.weights.config import LAYERS_ONLY
from quicksilver.weights.linear import keeping_expanded
from tests import tiny, tolerances
from tests.engines import (
    Run,
    decoder,
    fusion_plan,
    halting_plan,
    precision_plan,
    run_batch,
    run_chunks,
    run_steps,
    run_whole,
    shortcut_plan,
    skipping_plan,
    with_kv,
)
from tests.ops.any_precision import threads

pytestmark = [
    pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels"),
    pytest.mark.usefixtures("rounding_as_kernels"),
]

FORCED = ForcedRule((2, 99, 3, 99, 99))
CHANNEL = ChannelBitsRule((3.0, 1.5, 0.7, 0.3), bits=(8, 6, 4, 2, 0))
EXACT = {  # nothing that the kernels' rounding could decide otherwise
    "dense": Plan.dense(),
    "uniform": precision_plan(UniformBitsRule(4)),
    "drop": halting_plan(FORCED, DropFill(), min_layer=1),
    "propagate": halting_plan(FORCED, PropagateFill(), min_layer=1),
    "zero": halting_plan(FORCED, ZeroFill(), min_layer=1),
    "all halt": halting_plan(ForcedRule((2,)), PropagateFill(), min_layer=1, protect_first=0),
    "previous update": halting_plan(RelativeDriftRule(1e-9), PropagateFill(), min_layer=1),
    "shortcuts": shortcut_plan(Shortcut(1, "mlp"), Shortcut(2, "attention")),
    "low rank": shortcut_plan(Shortcut(2, "mlp"), rank=3),
    "fused prompt": fusion_plan(ForcedFusionRule((True, False)), layers=(1,)),
}
ROUGH = {  # thresholds that a value may lie on, and codes
    "channels": precision_plan(CHANNEL),
    "by token": precision_plan(EntropyBitsRule((7.1, 6.6), layer=2)),
    "skipping": skipping_plan(0.8),
    "skipping by all components": skipping_plan(0.8, estimate_dims_above=0.0),
    "entries": Plan("test", kv=KVConfig(bits=8)),
    "entries of 16 bits": Plan("test", kv=KVConfig(bits=16)),
    "all": with_kv(skipping_plan(0.3, precision_plan(CHANNEL)), bits=8),
}

SAME_BITS = ("dense", "uniform", "propagate", "shortcuts", "channels", "entries", "all")


@pytest.fixture
def sets() -> Iterator[None]:
    """Leave the instruction set as it was."""
    before = native.instruction_set()
    yield
    native.use_instruction_set(before)


def engines(family: str, plan: Plan) -> tuple[Decoder, Decoder]:
    model = tiny.quantized(family)
    return decoder(model, plan), decoder(model, plan, kernels="native")


def entries(run: Run, engine: Decoder) -> list[Any]:
    return [run.cache.entries(i, 0) for i in range(engine.spec.num_layers)]


@pytest.mark.parametrize("name", [*tiny.FAMILIES, *tiny.VARIANTS])
def test_all_that_families_have_is_run_by_the_kernels(name: str) -> None:
    """Other activations, as a variant's ReLU, they do not know."""
    reason = decoder(tiny.quantized(name), Plan.dense(), kernels="native").backend.reason
    of = tiny.config_of(name).to_dict()
    activation = next(of[key] for key in ("activation_function", "hidden_activation", "hidden_act") if of.get(key))
    assert (reason is None) == (activation in ("silu", "gelu_new", "gelu_pytorch_tanh"))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("family", dict.fromkeys((*tiny.FAMILIES, *tiny.WINDOWED)))
def test_states_entries_and_counts_are_those_of_single_layers(family: str, name: str) -> None:
    """A prompt longer than a window, steps, a chunk and steps again."""
    definition, engine = engines(family, EXACT[name])
    ids, chunks = tiny.token_ids(24), [12, 1, 1, 1, 6, 1, 1, 1]
    wanted, run = run_chunks(definition, ids, chunks), run_chunks(engine, ids, chunks)
    torch.testing.assert_close(run.logits, wanted.logits, atol=tolerances.KERNEL_LOGITS, rtol=0)
    assert executed_cost(engine.spec, run.trace) == executed_cost(engine.spec, wanted.trace)
    assert run.cache.used_nbytes == wanted.cache.used_nbytes
    assert [layer.entries_read for layer in run.trace.layers] == [x.entries_read for x in wanted.trace.layers]
    for one, other in zip(entries(run, engine), entries(wanted, engine), strict=True):
        assert torch.equal(one.positions, other.positions)
        assert one.masses is None if other.masses is None else torch.equal(one.masses, other.masses)
        torch.testing.assert_close(one.keys, other.keys, atol=tolerances.KERNEL_LOGITS, rtol=0)


@pytest.mark.parametrize(("family", "name"), tiny.on_telling(ROUGH, everywhere=["all"]))
def test_what_thresholds_decide_costs_as_much_and_loses_as_much(family: str, name: str) -> None:
    definition, engine = engines(family, ROUGH[name])
    losses: tuple[list[float], list[float]] = ([], [])
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for seed in range(3):  # in one text, a single decision that falls to the other side may be a large part of the mean
        ids = tiny.token_ids(60, seed=seed)
        runs = [run_steps(each, ids, prompt=48) for each in (definition, engine)]
        for i, run in enumerate(runs):
            losses[i].append(float(torch.nn.functional.cross_entropy(run.logits[:-1], ids[1:])))
            costs[i].append(executed_cost(engine.spec, run.trace))
        assert costs[1][-1].bitops == pytest.approx(costs[0][-1].bitops, rel=tolerances.KERNEL_COST_OF_A_TEXT)
        assert runs[1].cache.used_nbytes == runs[0].cache.used_nbytes
    assert mean(losses[1]) == pytest.approx(mean(losses[0]), abs=tolerances.KERNEL_LOSS)
    for count in (lambda cost: cost.body_macs, lambda cost: cost.bitops):
        assert sum(map(count, costs[1])) == pytest.approx(sum(map(count, costs[0])), rel=tolerances.KERNEL_COST)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_entries_of_16_bits_are_what_pytorch_keeps(family: str) -> None:
    """One bfloat16 step apart where rounding falls to the other side, beside what products are apart."""
    ids = tiny.token_ids(60)
    definition, engine = engines(family, ROUGH["entries of 16 bits"])
    _, exact = engines(family, Plan.dense())
    wanted, kept, floats = (entries(run_steps(each, ids, prompt=30), each) for each in (definition, engine, exact))
    for side in ("keys", "values"):
        # Before the first layer nothing that is read back takes part: floats and entries are of the same product.
        first, rounded = getattr(floats[0], side), getattr(kept[0], side)
        assert torch.equal(rounded, first.to(torch.bfloat16).float())
        assert not torch.equal(rounded, first)
        for ours, theirs in zip(kept, wanted, strict=True):
            one, other = getattr(ours, side), getattr(theirs, side)
            step = torch.maximum(bfloat16_step(one), bfloat16_step(other))
            assert bool(((one - other).abs() <= step + tolerances.KERNEL_LOGITS).all())


def bfloat16_step(numbers: torch.Tensor) -> torch.Tensor:
    """Return the distance to the next bfloat16 away from zero."""
    _, exponents = torch.frexp(numbers)
    return torch.ldexp(torch.ones_like(numbers), exponents - 8)


def test_entries_of_16_bits_keep_what_is_no_number() -> None:
    model = tiny.from_config(tiny.CONFIGS["llama"]())
    quantize_model(model, LAYERS_ONLY)
    engine = decoder(model, ROUGH["entries of 16 bits"], kernels="native")
    model.model.embed_tokens.weight.data[7] = float("nan")
    kept = entries(run_steps(engine, torch.tensor([1, 7, 2])), engine)
    for layer in kept:
        assert bool(layer.keys[1].isnan().all() & layer.values[1].isnan().all())
        assert bool(layer.keys[0].isfinite().all() & layer.values[0].isfinite().all())


@pytest.mark.parametrize("name", ["dense", "propagate", "entries of 16 bits", "all", "shortcuts"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "smollm3-windows"])
def test_instruction_sets_give_the_same_bits(family: str, name: str, sets: None) -> None:
    _, engine = engines(family, (EXACT | ROUGH)[name])
    ids = tiny.token_ids(20)
    logits = []
    for instruction_set in native.instruction_sets():
        native.use_instruction_set(instruction_set)
        logits.append(run_steps(engine, ids, prompt=5).logits)
    for other in logits[1:]:
        assert torch.equal(other, logits[0])


@pytest.mark.parametrize("name", ["uniform", "propagate", "all"])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_batch_is_its_sequences_alone(family: str, name: str) -> None:
    _, engine = engines(family, (EXACT | ROUGH)[name])
    sequences = [tiny.token_ids(n, seed=n) for n in (5, 1, 7)]
    alone = torch.cat([run_whole(engine, each).logits for each in sequences])
    atol = tolerances.LOGITS[torch.float32]  # of the head alone, which is PyTorch's
    torch.testing.assert_close(run_batch(engine, sequences).logits, alone, atol=atol, rtol=0)


def test_later_tokens_change_nothing() -> None:
    _, engine = engines("llama", ROUGH["all"])
    ids, changed = tiny.token_ids(24), tiny.token_ids(24)
    changed[12:] = tiny.token_ids(12, seed=5)
    chunks = [6, 10, 8]
    assert torch.equal(run_chunks(engine, ids, chunks).logits[:12], run_chunks(engine, changed, chunks).logits[:12])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_rounding_alone(count: int) -> None:
    definition, engine = engines("gpt2", EXACT["uniform"])
    ids = tiny.token_ids(10)
    with threads(count):
        logits = run_steps(engine, ids).logits
    torch.testing.assert_close(logits, run_steps(definition, ids).logits, atol=tolerances.KERNEL_LOGITS, rtol=0)


def test_python_threads_take_turns() -> None:
    _, engine = engines("llama", EXACT["dense"])
    ids = [tiny.token_ids(12, seed=seed) for seed in range(4)]
    alone, found = [run_steps(engine, each).logits for each in ids], {}
    workers = [Thread(target=lambda i=i: found.update({i: run_steps(engine, ids[i]).logits})) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(4))


def test_a_token_takes_one_call_where_nobody_is_asked_and_more_where_someone_is() -> None:
    calls: list[range] = []
    _, engine = engines("llama", EXACT["dense"])
    run = engine.backend.run
    engine.backend.run = lambda span, *rest: calls.append(span) or run(span, *rest)  # type: ignore[method-assign]
    run_steps(engine, tiny.token_ids(3))
    assert calls == [range(engine.spec.num_layers)] * 3
    assert span_ends(6, ()) == [6] * 6
    assert span_ends(6, (2, 3)) == [2, 2, 3, 4, 6, 6]


def test_kept_floats_come_first() -> None:
    model = tiny.quantized("llama")
    engine, ids = decoder(model, Plan.dense(), kernels="native"), tiny.token_ids(6)
    with keeping_expanded(model):
        kept = run_steps(engine, ids).logits
    assert torch.equal(kept, run_steps(decoder(model, Plan.dense()), ids).logits)


def test_a_state_that_is_no_number_stays_none() -> None:
    model = tiny.from_config(tiny.CONFIGS["llama"]())
    quantize_model(model, LAYERS_ONLY)
    engine = decoder(model, Plan.dense(), kernels="native")
    model.model.embed_tokens.weight.data[7] = float("nan")
    logits = run_steps(engine, torch.tensor([1, 7, 2])).logits
    assert bool(logits[0].isfinite().all())
    assert bool(logits[1].isnan().all())


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_variants_of_families_are_run_as_they_are_defined(name: str) -> None:
    """Scaling by layer, other activations, biases and rotary scaling: run by the kernels, or left to PyTorch."""
    model = tiny.from_config(tiny.VARIANTS[name]())
    quantize_model(model, LAYERS_ONLY)
    engines = (decoder(model, Plan.dense(), kernels=kernels) for kernels in ("torch", "native"))
    one, other = (run_steps(engine, tiny.token_ids(9)).logits for engine in engines)
    torch.testing.assert_close(one, other, atol=tolerances.KERNEL_LOGITS, rtol=0)


@pytest.mark.parametrize(("family", "name"), tiny.on_telling(SAME_BITS, everywhere=["dense", "propagate", "all"]))
def test_states_are_the_same_bits_alone_in_a_batch_and_in_chunks(family: str, name: str) -> None:
    """Of any number of rows, prompts and not."""
    _, engine = engines(family, (EXACT | ROUGH)[name])
    sequences = [tiny.token_ids(n, seed=n) for n in (5, 40, 1, 33, 60, 64, 64, 64, 64, 64, 64, 64)]  # 587 rows

    def states(parts: list[torch.Tensor], lengths: list[list[int]], prompt: bool) -> list[torch.Tensor]:
        """Return each sequence's states, fed in as many passes as there are lists of lengths."""
        cache, trace, found = engine.new_cache(len(parts)), engine.new_trace(), []
        for passed in zip(*(part.split(each) for part, each in zip(parts, lengths, strict=True)), strict=True):
            counts = [len(tokens) for tokens in passed]
            found.append(engine.run(torch.cat(passed), counts, cache, trace, prompt).split(counts))
        return [torch.cat(of_one) for of_one in zip(*found, strict=True)]

    alone = [states([ids], [[len(ids)]], prompt=False)[0] for ids in sequences]
    for prompt in (False, True):
        batch = states(sequences, [[len(ids)] for ids in sequences], prompt)
        chunks = states(sequences[5:], [[17, 1, 46]] * 7, prompt)
        for one, others in ((alone, batch), (alone[5:], chunks)):
            assert all(torch.equal(*pair) for pair in zip(one, others, strict=True))
