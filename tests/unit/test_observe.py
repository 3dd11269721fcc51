"""What is seen between layers and around sublayers is what hooks on transformers' own modules see."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from quicksilver.calibrate.observe import SublayerRows, layer_states, run, watch_sublayers
from quicksilver.calibrate.shortcuts import units
from quicksilver.families.registry import adapt
from quicksilver.plan import Plan
from quicksilver.rules import Shortcut
from tests import tiny, tolerances
from tests.engines import shortcut_plan

IDS = tiny.token_ids(40)
CLOSE = tolerances.LOGITS[torch.float32]
MODELS = [(family, quantized) for family in tiny.LAYOUTS for quantized in (False, True)]


def made(family: str, quantized: bool) -> Any:
    return tiny.quantized(family) if quantized else tiny.model(family)


def parts_of(model: Any) -> list[dict[str, tuple[Any, Any]]]:
    """Return the norm and the sublayer of transformers' modules, for each layer and part."""
    if model.config.model_type == "gpt2":
        return [{"attention": (h.ln_1, h.attn), "mlp": (h.ln_2, h.mlp)} for h in model.transformer.h]
    return [
        {"attention": (h.input_layernorm, h.self_attn), "mlp": (h.post_attention_layernorm, h.mlp)}
        for h in model.model.layers
    ]


def hooked(model: Any) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """Run transformers' model; return what entered each sublayer's norm, and what left the norm and the sublayer."""
    seen: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    hooks = []
    for layer_idx, parts in enumerate(parts_of(model)):
        for part, (norm, sublayer) in parts.items():
            rows = seen.setdefault((layer_idx, part), {})

            def of_norm(_: Any, args: Any, output: Any, rows: Any = rows) -> None:
                rows |= {"state": args[0][0], "normed": output[0]}

            def of_sublayer(_: Any, args: Any, output: Any, rows: Any = rows) -> None:
                rows["output"] = (output[0] if isinstance(output, tuple) else output)[0]

            hooks += [norm.register_forward_hook(of_norm), sublayer.register_forward_hook(of_sublayer)]
    try:
        with torch.no_grad():
            model(IDS[None])
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize(("family", "quantized"), MODELS)
def test_states_are_transformers_hidden_states(family: str, quantized: bool) -> None:
    model = made(family, quantized)
    adapter = adapt(model)
    states = layer_states(adapter, IDS)
    with torch.no_grad():
        wanted = copy.deepcopy(model)(IDS[None], output_hidden_states=True).hidden_states  # it leaves hooks
        found = [*states[:-1], adapter.final_norm(states[-1])]  # transformers gives the last one normed
    assert len(found) == len(wanted) == tiny.NUM_LAYERS + 1
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other[0], atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize(("family", "quantized"), MODELS)
def test_sublayers_are_seen_as_hooks_see_them(family: str, quantized: bool) -> None:
    model = made(family, quantized)
    adapter = adapt(model)
    wanted, seen = hooked(model), {}
    watch_sublayers(adapter, units(adapter), IDS, Plan.dense(), seen.__setitem__)
    assert list(seen) == units(adapter)  # in the order in which they run
    assert set(seen) == set(wanted)
    for unit, rows in seen.items():
        for name, value in zip(SublayerRows._fields, rows, strict=True):
            torch.testing.assert_close(value, wanted[unit][name], atol=CLOSE, rtol=CLOSE, msg=f"{unit} {name}")


def test_deeper_layers_than_those_watched_are_not_run() -> None:
    model, seen = tiny.model("llama"), []
    ran: set[int] = set()
    hooks = [
        layer.mlp.down_proj.register_forward_hook(lambda *_, i=i: ran.add(i))
        for i, layer in enumerate(model.model.layers)
    ]
    try:
        watch_sublayers(adapt(model), [(1, "attention")], IDS, Plan.dense(), lambda unit, rows: seen.append(unit))
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == [(1, "attention")]
    assert ran == {0, 1}


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_sublayer_is_seen_under_shortcuts_taken_before_it(family: str) -> None:
    """Its input is what the plan leaves, which is neither the dense model's nor that of a plan with nothing before."""
    adapter = adapt(tiny.model(family))
    plan = shortcut_plan(Shortcut(0, "mlp"), Shortcut(1, "attention"))
    seen: dict[Any, SublayerRows] = {}
    watch_sublayers(adapter, [(1, "mlp"), (2, "attention")], IDS, plan, seen.__setitem__)
    dense = layer_states(adapter, IDS)
    assert float((seen[2, "attention"].state - dense[2]).abs().max()) > 0.1
    # what the plan's own run of the first two layers ends with, which is what enters the third
    rows = seen[1, "mlp"]
    torch.testing.assert_close(seen[2, "attention"].state, rows.state + rows.output, atol=CLOSE, rtol=CLOSE)


def test_watching_changes_nothing() -> None:
    adapter, seen = adapt(tiny.model("llama")), {}
    before = run(adapter, IDS)
    watch_sublayers(adapter, units(adapter), IDS, Plan.dense(), seen.__setitem__)
    assert torch.equal(run(adapter, IDS), before)
    assert torch.equal(layer_states(adapter, IDS)[-1], before)
