"""Keys and values kept in 8 or 16 bits: what attention reads equals the definition, the cache shrinks, costs add up.

Runs that are compared with another way of computing the same are in float64, where nothing is so near the middle
between two codes that rounding decides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quicksilver import rules
from quicksilver.backends.resolved import resolve
from quicksilver.cache import CacheShape, ModelIdentity, SequenceCache
from quicksilver.cache.coded import decode, encode
from quicksilver.families.cost import dense_cost, executed_cost, kv_read_bytes
from quicksilver.families.quantize import quantize_model
from quicksilver.ops import native
from quicksilver.plan import Plan
from quicksilver.weights.config import LAYERS_ONLY
from tests import oracle, tiny, tolerances
from tests.engines import (
    FILLS,
    Run,
    at_one_layer,
    decoder,
    dense_pairs,
    fusion_plan,
    halting_plan,
    run_batch,
    run_chunks,
    run_steps,
    run_whole,
    skipping_plan,
    with_kv,
)
from tests.strategies import coded_plans

ATOL = tolerances.LOGITS[torch.float64]
LENGTH = 40
LIMITS = (0.0, 0.5, 0.7, 0.0)
CODED = Plan("coded", kv=rules.KVConfig(bits=8))


BITS = pytest.mark.parametrize("bits", [8, 16])


def coded(plan: Plan, bits: int = 8) -> Plan:
    return with_kv(plan, bits=bits)


def check(name: str, seed: int, plan: Plan, bits: int, halts=oracle.never, fusion: oracle.Fusion | None = None) -> Run:
    """Compare the engine with the oracle, alone and with keys and values left out too."""
    model, ids, plan = tiny.model(name, torch.float64), tiny.token_ids(LENGTH, seed), coded(plan, bits)
    run = run_whole(decoder(model, plan), ids)
    expected = oracle.run(model, ids, plan.kv.fill, halts, fusion, entry_bits=bits)
    torch.testing.assert_close(run.logits, expected.logits, atol=ATOL, rtol=0)
    plain = run_whole(decoder(model, with_kv(plan, bits=None)), ids)
    assert not torch.allclose(run.logits, plain.logits, atol=ATOL, rtol=0)
    skipping = run_whole(decoder(model, skipping_plan(LIMITS, plan)), ids)
    expected = oracle.run(model, ids, plan.kv.fill, halts, fusion, skip_below=LIMITS, entry_bits=bits)
    torch.testing.assert_close(skipping.logits, expected.logits, atol=ATOL, rtol=0)
    assert [layer.values_skipped for layer in skipping.trace.layers] == expected.skipped
    assert [layer.scores_skipped for layer in skipping.trace.layers] == expected.unscored
    return run


@BITS
@pytest.mark.parametrize("name", [*tiny.FAMILIES, *tiny.MORE])
def test_alone_it_equals_the_oracle(name: str, bits: int) -> None:
    check(name, 0, Plan("test"), bits)


@BITS
@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("name", tiny.TELLING)
def test_with_halting_it_equals_the_oracle(name: str, fill: rules.FillRule, bits: int) -> None:
    depths = torch.randint(1, 6, (LENGTH,), generator=torch.Generator().manual_seed(3))
    plan = halting_plan(rules.ForcedRule(tuple(depths.tolist())), fill)
    run = check(name, 1, plan, bits, lambda layer_idx, *_: depths <= layer_idx + 1)
    if bits == 16:
        assert not any(layer.signal_rows["entry"] for layer in run.trace.layers)  # rounding finds no magnitudes
        return
    written = [layer.signal_rows["entry"] for layer in run.trace.layers]
    project = isinstance(fill, rules.PropagateFill)
    assert written == [LENGTH if project else layer.query_rows for layer in run.trace.layers]


@pytest.mark.parametrize("fill", [None, *FILLS], ids=lambda f: "no halting" if f is None else type(f).__name__)
@pytest.mark.parametrize("name", tiny.TELLING)
def test_with_fusion_it_equals_the_oracle(name: str, fill: rules.FillRule | None) -> None:
    generator = torch.Generator().manual_seed(7)
    joins = tuple((torch.rand(LENGTH, generator=generator) < 0.7).tolist())
    depths = torch.randint(1, 6, (LENGTH,), generator=generator)
    halting = None if fill is None else rules.ForcedRule(tuple(depths.tolist()))
    # Not by means: they are taken in float32, which moves one of 12,000 numbers across a tie of the entries' rounding.
    plan = fusion_plan(rules.ForcedFusionRule(joins), halting, fill, layers=(1, 2), weights="last")
    fusion = oracle.Fusion((0, 1), 3, "last", lambda layer_idx, hidden, earlier, later: joins[later])
    halts = oracle.never if fill is None else lambda layer_idx, *_: depths <= layer_idx + 1
    check(name, 5, plan, 8 if fill is None else 16, halts, fusion)


@pytest.mark.slow
@settings(max_examples=40)
@given(plan=coded_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_prefill_equals_decode_equals_chunks(plan: Plan, family: str, length: int, data: st.DataObject) -> None:
    engine = decoder(tiny.model(family, torch.float64), replace(plan, fusion=None), special_ids=[7])
    ids, cut = tiny.token_ids(length, seed=length), data.draw(st.integers(1, length - 1))
    whole = run_whole(engine, ids)
    for parts in (run_steps(engine, ids), run_chunks(engine, ids, [cut, length - cut])):
        torch.testing.assert_close(whole.logits, parts.logits, atol=ATOL, rtol=0)
        assert executed_cost(engine.spec, whole.trace) == executed_cost(engine.spec, parts.trace)
        assert whole.cache.used_nbytes == parts.cache.used_nbytes


@pytest.mark.slow
@settings(max_examples=40)
@given(plan=coded_plans, family=st.sampled_from(tiny.FAMILIES), length=st.integers(2, 24), data=st.data())
def test_the_cache_does_not_depend_on_how_tokens_were_fed(
    plan: Plan, family: str, length: int, data: st.DataObject
) -> None:
    engine = decoder(tiny.model(family, torch.float64), at_one_layer(plan), special_ids=[7])
    ids, cut = tiny.token_ids(length, seed=length), data.draw(st.integers(1, length - 1))
    whole = run_chunks(engine, ids, [length], prompt=True)
    for sizes in ([cut, length - cut], [1] * length):
        parts = run_chunks(engine, ids, sizes, prompt=True)
        torch.testing.assert_close(whole.logits[-1], parts.logits[-1], atol=ATOL, rtol=0)
        for layer_idx in range(tiny.NUM_LAYERS):
            one, other = whole.cache.entries(layer_idx, 0), parts.cache.entries(layer_idx, 0)
            assert torch.equal(one.positions, other.positions)
            torch.testing.assert_close(one.keys, other.keys, atol=ATOL, rtol=0)
            torch.testing.assert_close(one.values, other.values, atol=ATOL, rtol=0)


@settings(max_examples=20)
@given(plan=coded_plans, family=st.sampled_from(tiny.FAMILIES), lengths=st.lists(st.integers(1, 20), min_size=2))
def test_a_batch_equals_its_sequences_alone(plan: Plan, family: str, lengths: list[int]) -> None:
    engine = decoder(tiny.model(family, torch.float64), plan)
    sequences = [tiny.token_ids(n, seed=n) for n in lengths[:4]]
    batch, alone = run_batch(engine, sequences), [run_whole(engine, ids) for ids in sequences]
    torch.testing.assert_close(batch.logits, torch.cat([run.logits for run in alone]), atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", tiny.LAYOUTS)
@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
def test_prefill_equals_decode_in_bfloat16(family: str, fill: rules.FillRule) -> None:
    model = tiny.from_config(tiny.CONFIGS[family]()).bfloat16()
    engine = decoder(model, coded(halting_plan(rules.RandomRule(0.35, seed=2), fill)))
    ids = tiny.token_ids(24)
    whole, steps = (run.logits.float() for run in (run_whole(engine, ids), run_steps(engine, ids, prompt=9)))
    assert (whole - steps).abs().max() / whole.abs().max() < tolerances.LOGITS[torch.bfloat16]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_cache_shrinks_and_its_bytes_are_those_of_the_tensors(family: str) -> None:
    engine, ids = decoder(tiny.model(family), CODED), tiny.token_ids(20)
    spec, run = engine.spec, run_whole(engine, ids)
    entry = 2 * spec.num_kv_heads * (spec.head_dim + 4)
    assert run.cache.nbytes == run.cache.used_nbytes == run.trace.kv_bytes == 4 * 20 * (entry + 4)
    assert kv_read_bytes(spec, run.trace) == 4 * 20 * entry
    plain = decoder(tiny.model(family), Plan.dense())
    assert run_whole(plain, ids).cache.nbytes == 4 * 20 * (2 * spec.num_kv_heads * spec.head_dim * 4 + 4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_entries_of_16_bits_are_half_as_large_and_count_their_bits(family: str) -> None:
    engine, ids = decoder(tiny.model(family), coded(Plan("test"), 16)), tiny.token_ids(20)
    spec, run = engine.spec, run_whole(engine, ids)
    entry = 2 * spec.num_kv_heads * spec.head_dim * 2
    assert run.cache.nbytes == run.cache.used_nbytes == run.trace.kv_bytes == 4 * 20 * (entry + 4)
    assert kv_read_bytes(spec, run.trace) == 4 * 20 * entry
    cost, dense = executed_cost(spec, run.trace), dense_cost(spec, run.trace)
    assert cost.flops == dense.flops
    products = sum(dense_pairs(engine, 20)) * spec.attention_macs_per_pair
    assert dense.bitops - cost.bitops == products * 32 * (32 - 16)


def test_codes_by_hand() -> None:
    rows = torch.tensor([[1.0, -127.0, 0.4, 63.6], [0.0, 0.0, 0.0, 0.0], [3e38, -3e38, 1.0, 0.0], [-2e-3, 1e-3, 0, 0]])
    codes, scales = encode(rows)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[1, -127, 0, 64], [0, 0, 0, 0], [127, -127, 0, 0], [-127, 64, 0, 0]]
    assert scales.flatten().tolist() == pytest.approx([1.0, 0.0, 3e38 / 127, 2e-3 / 127])
    assert decode(codes, scales, torch.float32)[0].tolist() == [1.0, -127.0, 0.0, 64.0]
    assert decode(codes, scales, torch.float32).isfinite().all()


@pytest.mark.parametrize("head_dim", [1, 2, 7, 16, 31, 32, 33, 40, 64, 80, 96, 128, 256])
def test_dimensions_that_a_rotation_turns_share_a_scale(head_dim: int) -> None:
    """With 16 pairs of neighbours: a group's large numbers take nothing from the others'."""
    rows = torch.randn(4, 2, head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(decode(*encode(rows), torch.float64), oracle.code(rows))
    half = (head_dim + 1) // 2
    last = [d for d in range(head_dim) if d % half >= (half - 1) // 16 * 16]
    others = [d for d in range(head_dim) if d not in last]
    rows[..., last] *= 1000
    error = (decode(*encode(rows), torch.float64) - rows).abs()
    assert encode(rows)[1].shape == (4, 2, -(-half // 16))
    assert not others or float(error[..., others].max()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_entry_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    rows = (torch.randn(50, 3, 16, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    rows[7], rows[8, 1, 4] = 0.0, 3e4  # nothing, and one component far above the others
    codes, scales = encode(rows)
    assert scales.dtype == torch.float32
    exact = decode(codes, scales, torch.float64)
    step = rows.double().abs().amax(-1, keepdim=True) / 127
    assert ((exact - rows.double()).abs() <= step * (0.5 + 1e-4)).all()
    read = decode(codes, scales, dtype)
    assert read.dtype == dtype
    assert (read[7] == 0).all()
    assert float(read[8, 1, 4]) == pytest.approx(float(rows[8, 1, 4]), rel=1e-2)


def test_what_is_not_finite_is_not_hidden() -> None:
    rows = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0], [1.0, 2.0]])
    assert decode(*encode(rows), torch.float32).isnan().all(-1).tolist() == [True, True, False]
    assert encode(torch.tensor([[1e-46, 0.0]], dtype=torch.float64))[0].tolist() == [[0, 0]]  # below a float32 scale


@BITS
def test_entries_of_fewer_bits_are_kept_as_what_they_mean(bits: int) -> None:
    cache = SequenceCache(CacheShape(1, 2, 4, torch.float32, torch.device("cpu"), bits), ModelIdentity())
    rows, positions = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    cache.append(0, positions[:3], rows[:3], -rows[:3])
    cache.append(0, positions[3:], rows[3:], -rows[3:])
    cache.advance(5)
    kept = decode(*encode(rows), torch.float32) if bits == 8 else rows.bfloat16().float()
    assert torch.equal(cache.entries(0).keys, kept)
    assert torch.equal(cache.entries(0).values, -kept)
    assert cache.truncate(4) == 4
    assert cache.entries(0).keys.shape == (4, 2, 4)
    assert cache.used_nbytes == 4 * (2 * 2 * (4 + 4) + 4)  # of codes and a scale, or of halves; and a position
    assert cache.copy().nbytes == cache.used_nbytes


def biased(name: str) -> Any:
    """Return a model whose keys have large biases in dimensions that rotate slowly, as Qwen2.5's first layers have."""
    model = tiny.from_config(tiny.config_of(name))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("k_proj.bias", "c_attn.bias")):
                keys = parameter if path.endswith("k_proj.bias") else parameter.view(3, -1)[1]
                keys[3::8], keys[7::8] = 300.0, -200.0
    return model


@BITS
@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "llama-tied-biased"])
def test_large_biases_of_keys_leave_entries_exact(name: str, kernels: Any, bits: int) -> None:
    """Unless it is taken out, what all keys have in common takes the codes of what tells them apart."""
    if kernels == "native" and not native.is_available():
        pytest.skip("there are no compiled kernels")
    model, ids = biased(name), tiny.token_ids(LENGTH)
    if kernels == "native":
        quantize_model(model, LAYERS_ONLY)
    exact, engine = (decoder(model, with_kv(Plan("test"), bits=each), kernels=kernels) for each in (None, bits))
    wanted, whole, steps = run_whole(exact, ids), run_whole(engine, ids), run_steps(engine, ids, prompt=9)
    assert all(centre is not None for centre in engine.adapter.key_centres)
    for run in (whole, steps):  # without it they are 2 to 6 apart
        assert float((run.logits - wanted.logits).abs().max()) < 0.8
        assert float((run.logits - wanted.logits).square().mean().sqrt()) < 0.1
    torch.testing.assert_close(steps.logits, whole.logits, atol=tolerances.KERNEL_LOGITS, rtol=0)


@BITS
@pytest.mark.parametrize("fill", FILLS, ids=lambda f: type(f).__name__)
def test_what_halted_tokens_leave_is_kept_like_other_keys(fill: rules.FillRule, bits: int) -> None:
    """A key of zeros, too, is one from which what keys have in common is taken."""
    depths = torch.randint(1, 6, (LENGTH,), generator=torch.Generator().manual_seed(3))
    plan, model = halting_plan(rules.ForcedRule(tuple(depths.tolist())), fill), biased("qwen2")
    ids = tiny.token_ids(LENGTH)
    wanted, run = (run_steps(decoder(model, with_kv(plan, bits=each)), ids, prompt=9) for each in (None, bits))
    assert float((run.logits - wanted.logits).square().mean().sqrt()) < 0.1


def test_plans_that_continue_one_cache_take_out_the_same() -> None:
    """Whatever has become of the model's biases when the second plan is resolved."""
    model = biased("qwen2")
    adapter = decoder(model, CODED).adapter
    before = adapter.key_centres
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias += 1000.0
    assert resolve(CODED, adapter).layers[0].key_centre is before[0]


@pytest.mark.parametrize("name", ["gemma2", "qwen3-biased", "olmo2-biased", "phi3", "qwen2"])
def test_nothing_is_taken_out_where_it_would_matter_or_is_little(name: str) -> None:
    """Scores with a cap, keys with a norm, maps without biases, small biases."""
    model = biased(name) if name != "qwen2" else tiny.model(name)
    assert decoder(model, CODED).adapter.key_centres == (None,) * tiny.NUM_LAYERS
