"""Our engine under its plans, all over one set of any-precision weights, through the public interface.

Whatever kernels the package has are used as they are for any user; nothing here chooses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import quicksilver
from benchmarks.forced import Forced, count
from benchmarks.gate import GateError, Work
from benchmarks.peers.engines import PEERS, Q4, Q8, TorchEngine, set_up_torch
from benchmarks.peers.subjects import Subject, random_windows
from benchmarks.tasks import Decode
from quicksilver import rules
from quicksilver.plan import Plan
from quicksilver.plan.presets import calibrated_plans, resolve_plan

UNIFORM_8, UNIFORM_4 = "uniform-8", "uniform-4"
CHANNEL, CHANNEL_SKIP = "channel-5.2", "channel-5.2-skip"
HALF = "-half"
MILD = "mild"
RANDOM_PLANS = (UNIFORM_8, UNIFORM_4, CHANNEL, CHANNEL_SKIP, UNIFORM_8 + HALF, CHANNEL + HALF)
MEAN_BITS = 5.2
_HALVES = rules.KVConfig(bits=16)  # llama.cpp keeps keys and values in 16 bits too
_CHANNEL_BITS = {CHANNEL: (8, 6, 4, 2), CHANNEL_SKIP: (8, 6, 4, 2, 0)}
_FIT_WINDOWS, _FIT_LENGTH = 4, 256
_COUNTED = 16  # decoded tokens over which bytes are counted


class OurEngine(TorchEngine):
    """One of our plans on the model that it runs on."""

    @torch.inference_mode()
    def tune(self, ids: Sequence[int], prompt: int, prefill: int) -> None:
        """Count what decoding a few tokens reads, and check that forced halting is what runs.

        Raises:
            GateError: tokens ran other layers than the plan forces.
        """
        task = Decode(torch.tensor([ids[: prompt + _COUNTED]]), prompt)
        cache = task.prepare(self.model)
        work = Work.total([self.model.stats for _ in task.calls(self.model, cache)])
        self.weight_bytes = work.weight_bytes_per_token
        self.details |= {"mean_depth": work.mean_depth, "kv_read_bytes_per_token": work.kv_read_bytes_per_token}
        if self.name.endswith(HALF):
            layers = self.model.adapter.spec.num_layers
            expected = count(Forced(layers, (layers, layers // 2)), prompt, task.passes).layers_run
            if round(work.tokens * work.mean_depth) != expected:
                raise GateError(
                    f"{self.name}: {work.tokens * work.mean_depth:g} layers ran, its plan forces {expected}"
                )


def plan_names(subject: Subject) -> tuple[str, ...]:
    """Return the names of our plans for a subject: those that are shipped with an embedded model among them."""
    if subject.is_random:
        return RANDOM_PLANS
    shipped = f"{subject.name}/{MILD}" in calibrated_plans()
    return (UNIFORM_8, UNIFORM_4, *((MILD,) if shipped else ()))


def quantize_to(floats: Path, target: Path) -> None:
    """Write a model with its weights quantized, the head too, each weight rounded on its own."""
    from quicksilver.families.quantize import quantize_model
    from quicksilver.loading.load import load_plain
    from quicksilver.loading.quantized import save_quantized
    from quicksilver.weights.config import QuantizationConfig

    model = load_plain(floats)
    quantize_model(model, QuantizationConfig(embeddings=False))
    save_quantized(model, target)


def fit_to(quantized: Path, name: str, target: Path) -> None:
    """Write a plan of channel bits, fitted to random tokens."""
    from quicksilver.calibrate.bits import fit

    rule = rules.ChannelBitsRule(bits=_CHANNEL_BITS[name], target=MEAN_BITS)
    model = quicksilver.load(quantized, special_ids=())
    windows = random_windows(model.config.vocab_size, _FIT_WINDOWS, _FIT_LENGTH)
    plan = fit(model.adapter, Plan(name, precision=rules.PrecisionConfig(rule)), windows)
    plan.save(target)


def plan_of(name: str, subject: Subject, num_layers: int) -> Plan:
    """Return one of our plans; those fitted to random weights from the subject's cache."""
    if name.endswith(HALF):
        whole = plan_of(name.removesuffix(HALF), subject, num_layers)
        halting = rules.HaltingConfig(
            rules.ForcedRule((num_layers, num_layers // 2)), min_layer=1, protect_first=0, protect_special=False
        )
        return replace(whole, name=name, halting=halting, kv=replace(whole.kv, fill=rules.DropFill()))
    if name in (UNIFORM_8, UNIFORM_4):
        config = rules.PrecisionConfig(rules.UniformBitsRule(int(name[-1])), protect_first=0, protect_special=False)
        return Plan(name, precision=config, kv=_HALVES)
    if name in _CHANNEL_BITS:
        return replace(Plan.load(plan_file(subject, name)), kv=_HALVES)
    # The head, quantized here, is not what its thresholds were fitted to; the layers' codes are.
    return replace(resolve_plan(name, subject.name), fitted_to=None)


def fitted_plans(names: Sequence[str]) -> list[str]:
    """Return the plans among these, or under their halting, that are fitted to the subject."""
    return [name for name in _CHANNEL_BITS if name in names or name + HALF in names]


def plan_file(subject: Subject, name: str) -> Path:
    """Return where a fitted plan is kept."""
    return subject.cache / f"{name}.json"


@torch.inference_mode()
def engines(subject: Subject, quantized: Path, names: Sequence[str], threads: int) -> list[OurEngine]:
    """Return our engine under each plan, all over the same weights, with so many threads of this process."""
    set_up_torch(threads)
    model = quicksilver.load(quantized, special_ids=() if subject.is_random else None)
    model.generation_config.eos_token_id = None  # generation never stops early
    built = []
    for name in names:
        plan = plan_of(name, subject, model.adapter.spec.num_layers)
        engine = quicksilver.accelerate(model, plan, model.special_ids)
        details = {"plan": plan.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
        built.append(OurEngine(name, _baseline(name), engine, details=details))
    return built


def is_ours(name: str) -> bool:
    """Whether an engine's name is one of our plans'."""
    return name not in PEERS


def _baseline(name: str) -> str:
    """Return the engine that a plan of ours is compared with."""
    if name.endswith(HALF):
        return name.removesuffix(HALF)
    return Q4 if name == UNIFORM_4 else Q8
