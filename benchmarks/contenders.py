"""The model that is measured and the engines that run it: Hugging Face's own, ours dense, with halting, with fusion.

What they are asked to do is in `tasks.py`. The package is imported only for its own engines, so that it
does not weigh on the memory of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.forced import Forced

SEED = 0
POSITIONS = 2048  # twice the published ones, so that tokens can be decoded after a prompt of 1,024
HUGGINGFACE, DENSE = "huggingface", "dense"
FILLS = ("drop", "zero", "propagate")
HALVED = tuple(f"half-{fill}" for fill in FILLS)
FUSED = "half-fused"
_QUICK_SHAPE: dict[str, Any] = {
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 4,
    "vocab_size": 1000,
    "bos_token_id": 999,
    "eos_token_id": 999,
}


@dataclass(frozen=True)
class Contender:
    """An engine over the model.

    Attributes:
        name: as in tables and rows.
        model: called as transformers' models are.
        baseline: the engine it is compared with; itself where it is the baseline.
        forced: what its plan makes of tokens; None where the engine keeps no count.
    """

    name: str
    model: Any
    baseline: str
    forced: Forced | None = None


def build_model(quick: bool) -> GPT2LMHeadModel:
    """Return a random GPT-2 in the shape with 124 million parameters, or a very small one, always the same weights.

    Generation never stops early: the end-of-text token has no meaning in it.
    """
    torch.manual_seed(SEED)
    shape = _QUICK_SHAPE if quick else {}
    model = GPT2LMHeadModel(GPT2Config(n_positions=POSITIONS, **shape)).eval()
    model.generation_config.eos_token_id = None
    return model


def random_ids(model: GPT2LMHeadModel, count: int) -> torch.Tensor:
    """Return [1, count] token ids, always the same, none of them special (the last of the vocabulary is)."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, model.config.vocab_size - 1, (1, count), generator=generator)


def huggingface(model: GPT2LMHeadModel) -> Contender:
    """Return the model as transformers runs it."""
    return Contender(HUGGINGFACE, model, HUGGINGFACE)


def dense(model: GPT2LMHeadModel) -> Contender:
    """Return our engine with every mechanism off."""
    import quicksilver

    layers = model.config.n_layer
    return Contender(DENSE, quicksilver.accelerate(model, "dense"), HUGGINGFACE, Forced(layers, (layers,)))


def halved(model: GPT2LMHeadModel, fill: str) -> Contender:
    """Return our engine with every second token halting at half the depth, under a KV fill."""
    import quicksilver
    from quicksilver import rules

    fills = {
        "drop": rules.DropFill,
        "zero": rules.ZeroFill,
        "propagate": rules.PropagateFill,
    }
    layers = model.config.n_layer
    forced = Forced(layers, (layers, layers // 2), fills=fill != "drop")
    halting = rules.HaltingConfig(rules.ForcedRule(forced.depths), min_layer=1, protect_first=0)
    plan = quicksilver.Plan(f"half-{fill}", halting, rules.KVConfig(fills[fill]()))
    return Contender(plan.name, quicksilver.accelerate(model, plan), DENSE, forced)


def fused(model: GPT2LMHeadModel) -> Contender:
    """Return our engine with every second token of a prompt fusing into the next at a third of the depth."""
    import quicksilver
    from quicksilver import rules

    layers = model.config.n_layer
    after = layers // 3
    fusion = rules.FusionConfig(
        rules.ForcedFusionRule((False, True)), layers=(after,), max_group=2, protect_first=0, protect_special=False
    )
    engine = quicksilver.accelerate(model, quicksilver.Plan(FUSED, fusion=fusion))
    return Contender(FUSED, engine, DENSE, Forced(layers, (layers,), fused_after=after))


def build_contenders(model: GPT2LMHeadModel) -> list[Contender]:
    """Return every engine over one model, each after the one it is compared with."""
    return [huggingface(model), dense(model), *(halved(model, fill) for fill in FILLS), fused(model)]
