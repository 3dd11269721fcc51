"""A halted token never runs again; protection holds; counters and bytes say what ran and what is held."""

from __future__ import annotations

import pytest
import torch

from quicksilver import rules
from quicksilver.errors import InputError, PlanError
from quicksilver.plan import Plan
from tests import tiny
from tests.engines import decoder, halting_plan, run_chunks, run_whole

DEPTHS = (1, 4, 2, 3, 4)


def test_counters_follow_the_forced_depths() -> None:
    engine, ids = decoder(tiny.model("llama"), halting_plan(rules.ForcedRule(DEPTHS))), tiny.token_ids(10)
    trace = run_whole(engine, ids).trace
    assert trace.depths[0].tolist() == list(DEPTHS) * 2
    assert [layer.query_rows for layer in trace.layers] == [10, 8, 6, 4]
    assert [layer.halted for layer in trace.layers] == [2, 2, 2, 0]
    assert trace.mean_depth == pytest.approx(2.8)


def test_a_halted_state_never_changes_again() -> None:
    """The state a token halts with equals its state after that many layers of the dense model."""
    model, ids = tiny.model("llama"), tiny.token_ids(6)
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states  # before each layer, and the normed end
    engine = decoder(model, halting_plan(rules.ForcedRule((2,))))
    hidden = engine.run(ids, [6], engine.new_cache(1), engine.new_trace())
    torch.testing.assert_close(hidden, states[2][0])


def test_fills_hold_what_they_say() -> None:
    ids = tiny.token_ids(10)
    caches = {
        type(fill): run_whole(decoder(tiny.model("qwen2"), halting_plan(rules.ForcedRule(DEPTHS), fill)), ids).cache
        for fill in (rules.DropFill(), rules.ZeroFill(), rules.PropagateFill())
    }
    counts = {fill: [cache.entry_counts(i)[0] for i in range(4)] for fill, cache in caches.items()}
    assert counts.pop(rules.DropFill) == [10, 8, 6, 4]
    assert all(count == [10, 10, 10, 10] for count in counts.values())
    shape = caches[rules.DropFill].shape
    entry = 2 * shape.num_kv_heads * shape.head_dim * 4
    assert caches[rules.DropFill].nbytes == 28 * (entry + 4)  # keys, values and a 4-byte position
    assert caches[rules.ZeroFill].nbytes == caches[rules.PropagateFill].nbytes == 40 * (entry + 4)
    assert all(cache.nbytes == cache.used_nbytes for cache in caches.values())


def test_zero_fill_writes_zeros() -> None:
    engine = decoder(tiny.model("llama"), halting_plan(rules.ForcedRule(DEPTHS), rules.ZeroFill()))
    entries = run_whole(engine, tiny.token_ids(10)).cache.entries(3, 0)
    assert not entries.keys[0].any()
    assert not entries.values[0].any()
    assert entries.keys[1].any()


def test_first_tokens_special_tokens_and_first_layers_are_protected() -> None:
    ids = tiny.token_ids(12)
    ids[7] = 9
    plan = Plan("p", rules.HaltingConfig(rules.ForcedRule((1,)), min_layer=2, protect_first=3))
    for chunks in ([12], [2, 5, 5]):
        run = run_chunks(decoder(tiny.model("llama"), plan, special_ids=[9]), ids, chunks)
        assert torch.cat(run.trace.depths).tolist() == [4, 4, 4, 2, 2, 2, 2, 4, 2, 2, 2, 2]


def test_min_layer_as_a_fraction_of_the_depth() -> None:
    plan = Plan("p", rules.HaltingConfig(rules.ForcedRule((1,)), min_layer=0.75, protect_first=0))
    run = run_whole(decoder(tiny.model("llama"), plan), tiny.token_ids(4))
    assert run.trace.depths[0].tolist() == [3, 3, 3, 3]


def test_all_only_asks_later_rules_about_open_tokens() -> None:
    rule = rules.AllRule((rules.ForcedRule((9, 1)), rules.EntropyRule(1e9)))
    trace = run_whole(decoder(tiny.model("llama"), halting_plan(rule)), tiny.token_ids(20)).trace
    assert trace.layers[0].signal_rows["head"] == 10


def test_a_cache_left_incomplete_by_a_failure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the middle of a pass: some layers have written, others have not."""
    model, ids = tiny.from_config(tiny.CONFIGS["llama"]()), tiny.token_ids(6)
    engine = decoder(model, Plan.dense())
    cache = engine.new_cache(1)
    engine.run(ids, [6], cache, engine.new_trace())

    def fail(module: object, args: object) -> None:
        raise MemoryError

    handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        engine.run(ids, [6], cache, engine.new_trace())
    handle.remove()
    with pytest.raises(InputError, match="incomplete"):
        engine.run(ids, [6], cache, engine.new_trace())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (rules.HaltingConfig(rules.DriftRule((1.0, 2.0, 3.0))), "3 thresholds, the model has 4 layers"),
        (rules.HaltingConfig(rules.EntropyRule(1.0, layers=(1, 4))), "after layer 4, the model has 4"),
        (rules.HaltingConfig(rules.AllRule((rules.EntropyRule(1.0, layers=(9,)),))), "after layer 9"),
        (rules.HaltingConfig(rules.DriftRule(1.0), min_layer=5), "min_layer is 5, the model has 4 layers"),
    ],
    ids=str,
)
def test_plans_that_do_not_fit_the_depth_are_refused(config: rules.HaltingConfig, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        decoder(tiny.model("llama"), Plan("p", config))


def test_a_fraction_of_the_depth_is_rounded_up() -> None:
    config = rules.HaltingConfig(rules.DriftRule(1.0), min_layer=0.5)
    assert [config.first_halt(layers) + 1 for layers in (1, 3, 5, 7, 9, 12)] == [1, 2, 3, 4, 5, 6]
