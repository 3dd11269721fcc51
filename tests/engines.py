"""Short ways of running the engine in tests: a whole sequence, token by token, in chunks, in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quicksilver.cache import RaggedKVCache
from quicksilver.core.trace import Trace
from quicksilver.families.registry import adapt
from quicksilver.ops.native import KernelChoice
from quicksilver.plan import Plan
from quicksilver.plan.tensors import PlanTensors
from quicksilver.rules import (
    DropFill,
    FillRule,
    FusionConfig,
    FusionRule,
    HaltingConfig,
    HaltingRule,
    KVConfig,
    PrecisionConfig,
    PrecisionRule,
    PropagateFill,
    Shortcut,
    Threshold,
    ZeroFill,
)
from quicksilver.runtime.loop import Decoder
from tests import tiny

FILLS = (DropFill(), ZeroFill(), PropagateFill())


def dense_pairs(engine: Decoder, length: int) -> list[int]:
    """Return the (query, key) pairs of a sequence in each layer, as windows have it."""
    return [sum(min(t + 1, layer.window or length) for t in range(length)) for layer in engine.spec.layers]


class Run(NamedTuple):
    """Logits of every token [N, vocab], the cache, and the trace with per-token depths."""

    logits: Tensor
    cache: RaggedKVCache
    trace: Trace


def halting_plan(rule: HaltingRule, fill: FillRule | None = None, **protection: Any) -> Plan:
    """Return a plan that halts by `rule` with nothing protected unless asked for."""
    config = HaltingConfig(rule, **{"min_layer": 1, "protect_first": 0, "protect_special": False, **protection})
    return Plan("test", config, KVConfig(fill or DropFill()))


def fusion_plan(
    rule: FusionRule, halting: HaltingRule | None = None, fill: FillRule | None = None, **options: Any
) -> Plan:
    """Return a plan that fuses tokens by `rule` and halts by `halting`, with nothing protected.

    All tokens, and prompts alone where several layers are given.
    """
    layers = options.pop("layers", (1,))
    free = {"protect_first": 0, "protect_special": False, "scope": "all" if len(layers) == 1 else "prompt"}
    config = FusionConfig(rule, **{"layers": layers, "max_group": 3, **free, **options})
    stops = None if halting is None else HaltingConfig(halting, min_layer=1, protect_first=0, protect_special=False)
    return Plan("test", stops, KVConfig(fill or DropFill()), config)


def at_one_layer(plan: Plan) -> Plan:
    """Return the plan with the first of its fusion layers alone."""
    fusion = plan.fusion
    return plan if fusion is None else replace(plan, fusion=replace(fusion, layers=fusion.layers[:1]))


def precision_plan(rule: PrecisionRule, **others: Any) -> Plan:
    """Return a plan that chooses bits by `rule` with nothing protected."""
    return Plan("test", precision=PrecisionConfig(rule, protect_first=0, protect_special=False), **others)


def shortcut_plan(*shortcuts: Shortcut, rank: int | None = None, protection: Any = None, **others: Any) -> Plan:
    """Return a plan that lets tokens past sublayers, with nothing protected unless asked for."""
    own = {"protect_first": 0, "protect_special": False, **(protection or {})}
    halting = others.pop("halting", None)
    if halting is None:
        config = HaltingConfig(shortcuts=shortcuts, **own)
    else:
        config = replace(halting, shortcuts=shortcuts, **{f"shortcuts_{name}": value for name, value in own.items()})
    return Plan("test", config, tensors=tiny.shortcut_tensors(rank=rank), **others)


def skipping_plan(threshold: Threshold, plan: Plan | None = None, estimate_dims_above: float = 1.0) -> Plan:
    """Return a plan, dense unless one is given, that leaves out keys and values of little weight, too."""
    return with_kv(plan or Plan("test"), skip_below=threshold, estimate_dims_above=estimate_dims_above)


def with_kv(plan: Plan, **changes: Any) -> Plan:
    """Return a plan with other settings of its cache."""
    return replace(plan, kv=replace(plan.kv, **changes))


def with_maps(plan: Plan, tensors: PlanTensors, output_maps: bool = True) -> Plan:
    """Return a plan with tensors, and with output maps."""
    halting = (
        HaltingConfig(output_maps=True) if plan.halting is None else replace(plan.halting, output_maps=output_maps)
    )
    return replace(plan, halting=halting, tensors=tensors)


def decoder(model: Any, plan: Plan, kernels: KernelChoice = "torch", **options: Any) -> Decoder:
    """Return the engine for a transformers model; unless kernels are asked for, by the definition throughout."""
    return Decoder(adapt(model, kernels), plan, **options)


def fuses_prompts_alone(engine: Decoder) -> bool:
    """Whether a plan fuses at several layers, so that tests feed it prompts."""
    return engine.plan.fusion is not None and len(engine.plan.fusion.layers) > 1


def run_chunks(engine: Decoder, ids: Tensor, chunks: Sequence[int], prompt: bool | None = None) -> Run:
    """Feed one sequence in chunks of the given sizes; as no prompt, unless asked for or with several fusion layers."""
    cache, trace = engine.new_cache(1), engine.new_trace(per_token=True)
    prompt = fuses_prompts_alone(engine) if prompt is None else prompt
    hidden = [engine.run(chunk, [len(chunk)], cache, trace, prompt) for chunk in ids.split(list(chunks))]
    return Run(engine.logits(torch.cat(hidden), trace), cache, trace)


def run_whole(engine: Decoder, ids: Tensor) -> Run:
    """Feed one sequence at once."""
    return run_chunks(engine, ids, [len(ids)])


def run_steps(engine: Decoder, ids: Tensor, prompt: int = 1) -> Run:
    """Prefill `prompt` tokens, then feed the rest one at a time."""
    return run_chunks(engine, ids, [prompt, *[1] * (len(ids) - prompt)])


def run_batch(engine: Decoder, sequences: Sequence[Tensor]) -> Run:
    """Feed several sequences of any lengths in one ragged batch; logits are end to end."""
    cache, trace = engine.new_cache(len(sequences)), engine.new_trace(per_token=True)
    prompt = fuses_prompts_alone(engine)
    hidden = engine.run(torch.cat(list(sequences)), [len(s) for s in sequences], cache, trace, prompt)
    return Run(engine.logits(hidden, trace), cache, trace)
