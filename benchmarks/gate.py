"""The correctness gate: no time is taken of an engine that computes something else than it should.

It also counts each engine's work, as the engine itself reports it; seconds are `timing.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import DENSE, HUGGINGFACE, Contender
from benchmarks.forced import Counts, count
from benchmarks.tasks import Task

LOGITS_TOLERANCE = 1e-4  # largest absolute difference of float32 logits


class GateError(Exception):
    """An engine does not compute what it should; the message says which and by how much."""


@dataclass(frozen=True)
class Work:
    """What one run of a task took, by the engine's own count.

    Attributes:
        tokens: tokens fed.
        flops: FLOPs of what ran.
        dense_flops: FLOPs of the dense model for the same tokens.
        mean_depth: layers run per token.
        weight_bytes_per_token: weight bytes read per token were each decoded alone.
        kv_read_bytes_per_token: bytes of keys and values that attention read, over the tokens fed.
        fused_by_layer: tokens that a later one absorbed after each layer.
    """

    tokens: int
    flops: int
    dense_flops: int
    mean_depth: float
    weight_bytes_per_token: float
    kv_read_bytes_per_token: float
    fused_by_layer: tuple[int, ...]

    @classmethod
    def total(cls, stats: Sequence[Any]) -> Work:
        """Add up the stats of a run's calls."""
        tokens = sum(s.tokens for s in stats)
        return cls(
            tokens=tokens,
            flops=sum(s.flops for s in stats),
            dense_flops=sum(s.dense_flops for s in stats),
            mean_depth=sum(s.tokens * s.mean_depth for s in stats) / tokens,
            weight_bytes_per_token=sum(s.tokens * s.weight_bytes_per_token for s in stats) / tokens,
            kv_read_bytes_per_token=sum(s.kv_read_bytes for s in stats) / tokens,
            fused_by_layer=tuple(map(sum, zip(*(s.fused_by_layer for s in stats), strict=True))),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON-ready values."""
        return asdict(self)


def check(contenders: Sequence[Contender], tasks: Sequence[Task], prompt: Tensor) -> dict[tuple[str, str], Work]:
    """Check every engine on every task it is timed on.

    Args:
        contenders: the engines.
        tasks: what they will be timed on.
        prompt: [1, T] tokens on all of which dense logits are compared.

    Returns:
        Work by (task, engine), for the engines that count theirs.

    Raises:
        GateError: dense logits or tokens are not Hugging Face's, or a count is not what the plan forces.
    """
    by_name = {contender.name: contender for contender in contenders}
    theirs, ours = by_name[HUGGINGFACE], by_name[DENSE]
    _compare("prompt", theirs.model(prompt).logits, ours.model(prompt).logits)
    work = {}
    for task in tasks:
        for expected, actual in zip(_outputs(task, theirs), _outputs(task, ours), strict=True):
            _compare(task.name, expected, actual)
        for contender in contenders:
            if contender.forced is not None and (task.engines is None or contender.name in task.engines):
                expected = count(contender.forced, task.prompt, task.passes)
                work[task.name, contender.name] = _count(task, contender, expected)
    return work


def _outputs(task: Task, contender: Contender) -> list[Tensor]:
    return list(task.calls(contender.model, task.prepare(contender.model)))


def _compare(where: str, expected: Tensor, actual: Tensor) -> None:
    """Raise GateError unless logits agree to the tolerance, or token ids exactly."""
    if expected.shape != actual.shape:
        raise GateError(f"{where}: dense gave {tuple(actual.shape)}, Hugging Face {tuple(expected.shape)}")
    if not expected.is_floating_point():
        if not torch.equal(expected, actual):
            raise GateError(f"{where}: dense did not generate Hugging Face's tokens")
        return
    difference = float((expected - actual).abs().max())
    if not difference <= LOGITS_TOLERANCE:  # NaN fails too
        raise GateError(
            f"{where}: dense logits differ from Hugging Face's by {difference:.3g}, more than {LOGITS_TOLERANCE:g}"
        )


def _count(task: Task, contender: Contender, expected: Counts) -> Work:
    """Run a task once, add up its work, and hold it against what the plan forces."""
    state = task.prepare(contender.model)
    work = Work.total([contender.model.stats for _ in task.calls(contender.model, state)])
    kv_read_bytes = expected.entries_read * _entry_bytes(contender.model)
    compared = (
        ("tokens fed", work.tokens, expected.tokens),
        ("tokens fused after each layer", work.fused_by_layer, expected.fused_by_layer),
        ("layers run by all tokens", round(work.tokens * work.mean_depth), expected.layers_run),
        ("bytes of keys and values read", round(work.tokens * work.kv_read_bytes_per_token), kv_read_bytes),
    )
    for what, counted, forced in compared:
        if counted != forced:
            raise GateError(f"{task.name}: {what}: {contender.name} counts {counted}, its plan forces {forced}")
    return work


def _entry_bytes(model: Any) -> int:
    """Return the bytes of one token's key and value in one layer of a GPT-2, all heads together."""
    return 2 * model.config.n_embd * model.dtype.itemsize
