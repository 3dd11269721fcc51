"""The model that is measured and the engines that run it: Hugging Face's own, ours dense, ours with halting.

What they are asked to do is in `tasks.py`. The package is imported only for its own engines, so that it
does not weigh on the memory of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

SEED = 0
HUGGINGFACE, DENSE = "huggingface", "dense"
FILLS = ("drop", "zero", "propagate", "share")
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
        depths: layers that tokens at positions 0, 1, ... run, repeated; None where the engine keeps no count.
    """

    name: str
    model: Any
    baseline: str
    depths: tuple[int, ...] | None = None

    def mean_depth(self, positions: range) -> float | None:
        """Return the layers per token that tokens at these positions must run."""
        if self.depths is None:
            return None
        return sum(self.depths[p % len(self.depths)] for p in positions) / len(positions)


def build_model(quick: bool) -> GPT2LMHeadModel:
    """Return a random GPT-2 of 124 million parameters, or a very small one, always with the same weights.

    Generation never stops early: the end-of-text token has no meaning in it.
    """
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(GPT2Config(**_QUICK_SHAPE) if quick else GPT2Config()).eval()
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

    return Contender(DENSE, quicksilver.accelerate(model, "dense"), HUGGINGFACE, (model.config.n_layer,))


def halved(model: GPT2LMHeadModel, fill: str) -> Contender:
    """Return our engine with every second token halting at half the depth, under a KV fill."""
    import quicksilver
    from quicksilver.core import rules

    fills = {
        "drop": rules.DropFill,
        "zero": rules.ZeroFill,
        "propagate": rules.PropagateFill,
        "share": rules.ShareFill,
    }
    depths = (model.config.n_layer, model.config.n_layer // 2)
    halting = rules.HaltingConfig(rules.ForcedRule(depths), min_layer=1, protect_first=0)
    plan = quicksilver.Plan(f"half-{fill}", halting, fills[fill]())
    return Contender(plan.name, quicksilver.accelerate(model, plan), DENSE, depths)


def build_contenders(model: GPT2LMHeadModel) -> list[Contender]:
    """Return every engine over one model, each after the one it is compared with."""
    return [huggingface(model), dense(model), *(halved(model, fill) for fill in FILLS)]
