"""Our engine on a GGUF file, its codes as they are, for each instruction set, with a long prompt fed once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quicksilver
from benchmarks.peers.engines import set_up_torch
from benchmarks.peers.ours import OurEngine
from quicksilver import rules
from quicksilver.loading.gguf.model import GgufModel, float_model
from quicksilver.ops import native
from quicksilver.plan import Plan
from quicksilver.plan.presets import resolve_plan

OURS, OURS_16 = "quicksilver", "quicksilver-kv16"
PORTABLE = "portable"  # not an instruction set that anybody would wait for
_CHUNK = 512  # tokens of a long prompt fed at a time


@dataclass
class Prefix:
    """A sequence kept by the engines of one plan: its tokens, and their cache."""

    ids: list[int] = field(default_factory=list)
    cache: Any = None


@dataclass
class HeldEngine(OurEngine):
    """A plan on one instruction set; `start` keeps what is held already of a prompt.

    Attributes:
        isa: as the kernels name it.
        prefix: what is held; instruction sets compute the same bits, so they share it.
    """

    isa: str = ""
    prefix: Prefix = field(default_factory=Prefix)

    def tune(self, ids: Sequence[int], prompt: int, prefill: int) -> None:
        """Count the bytes that a decoded token reads."""
        self._switch()
        super().tune(ids, prompt, prefill)

    def logits(self, ids: Sequence[int], singly: int) -> np.ndarray:
        """Return every token's logits, [T, vocab] float32."""
        self._switch()
        return super().logits(ids, singly)

    def prefill(self, ids: Sequence[int]) -> None:
        """Feed a prompt at once."""
        self._switch()
        super().prefill(ids)

    @torch.inference_mode()
    def start(self, prompt: Sequence[int]) -> Any:
        """Forget what follows the prompt, feed what is missing, in chunks; return the cache."""
        self._switch()
        held = self.prefix
        if held.ids and held.ids == list(prompt[: len(held.ids)]):
            held.cache.truncate([len(held.ids)])
        else:
            held.ids, held.cache = [], None
        for chunk in torch.tensor(prompt[len(held.ids) :], dtype=torch.long).split(_CHUNK):
            if len(chunk):
                output = self.model(chunk[None], past_key_values=held.cache, use_cache=True, logits_to_keep=1)
                held.cache = output.past_key_values
        held.ids = list(prompt)
        return held.cache

    def _switch(self) -> None:
        native.use_instruction_set(self.isa)


@torch.inference_mode()
def load_held(path: Path, baseline: str, threads: int) -> list[HeldEngine]:
    """Return our engines on a file: plan `dense` on each instruction set, and with 16-bit keys and values on the best.

    Args:
        path: the file.
        baseline: the engine that they are compared with.
        threads: of this process.
    """
    set_up_torch(threads)
    model = quicksilver.load(path, kernels="native", special_ids=())
    model.generation_config.eos_token_id = None  # generation never stops early
    dense = resolve_plan("dense")
    best, *others = (isa for isa in native.instruction_sets() if isa != PORTABLE)

    def engines(name: str, plan: Plan, isas: Sequence[str]) -> list[HeldEngine]:
        prefix, run = Prefix(), quicksilver.accelerate(model, plan, (), "native")
        details = {
            "plan": plan.to_dict(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "backend": run.backend.name,
        }
        return [
            HeldEngine(f"{name} ({isa})", baseline, run, details={**details, "isa": isa}, isa=isa, prefix=prefix)
            for isa in isas
        ]

    halves = replace(dense, name="dense-kv16", kv=rules.KVConfig(bits=16))  # llama.cpp keeps 16 bits too
    return [*engines(OURS_16, halves, [best]), *engines(OURS, dense, [best, *others])]


def seconds_to_load(path: Path, threads: int) -> float:
    """Return the seconds until a file's model can be used, what is imported not among them."""
    import transformers.models.auto  # noqa: F401

    set_up_torch(threads)
    native.extension()
    start = time.perf_counter()
    quicksilver.load(path, kernels="native")
    return time.perf_counter() - start


@torch.inference_mode()
def reference_logits(path: Path, threads: int, ids: Sequence[int], keep: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Return logits of the file's weights as float32 numbers, computed by transformers.

    Args:
        path: the file.
        threads: of this process.
        ids: tokens of a text.
        keep: (fed, kept): how many tokens are fed, and of how many of the last the logits are returned.
    """
    set_up_torch(threads)
    model = float_model(GgufModel(path))
    return [model(torch.tensor([ids[:fed]]), logits_to_keep=kept).logits[0].numpy() for fed, kept in keep]
