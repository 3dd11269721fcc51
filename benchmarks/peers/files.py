"""What each engine reads, made once from a subject's floats and kept: every file in a process of its own.

How each is made is its engine's.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import call_apart
from benchmarks.peers import ctranslate2_engine, gguf_file, ours
from benchmarks.peers.engines import CT2, Q4, Q8, set_up_torch
from benchmarks.peers.subjects import Subject, write_random

_FILE_TYPES = {Q8: 7, Q4: 2}  # llama.cpp's LLAMA_FTYPE_MOSTLY_Q8_0 and _Q4_0


def path_of(name: str, subject: Subject) -> Path:
    """Return the file or folder that an engine reads."""
    if name in _FILE_TYPES:
        return subject.cache / f"{name.removeprefix('llama.cpp-')}.gguf"
    if name == CT2:
        return subject.cache / CT2
    return subject.cache / "quantized" if ours.is_ours(name) else subject.floats


def prepare(subject: Subject, names: Sequence[str], threads: int, say: Callable[[str], None]) -> None:
    """Make what the engines need and is not there yet, one file after the other."""
    subject.cache.mkdir(parents=True, exist_ok=True)

    def make(target: Path, function: Callable[..., None], *arguments: Any) -> None:
        _make(target, threads, say, function, *arguments)

    if subject.is_random:
        make(subject.floats, write_random, subject.name, subject.quick)
    _prepare_gguf(subject, [name for name in names if name in _FILE_TYPES], threads, make)
    if CT2 in names:
        make(path_of(CT2, subject), ctranslate2_engine.convert, subject.floats)
    mine = [name for name in names if ours.is_ours(name)]
    if mine:
        quantized = path_of(mine[0], subject)
        make(quantized, ours.quantize_to, subject.floats)
        for name in ours.fitted_plans(mine):
            make(ours.plan_file(subject, name), ours.fit_to, quantized, name)


def reference_logits(
    subject: Subject, ids: Sequence[int], keep: int, threads: int, say: Callable[[str], None]
) -> np.ndarray:
    """Return the float model's logits [keep, vocab], computed in float32 whatever the dtype of its weights.

    Args:
        subject: the model.
        ids: tokens, fed in one pass.
        keep: of how many of the last tokens.
        threads: of the process that computes them, where they are not there yet.
        say: told that they are made.
    """
    digest = hashlib.sha256(repr((list(ids), keep)).encode()).hexdigest()[:8]
    target = subject.cache / f"reference-{digest}.npy"
    _make(target, threads, say, _write_reference, subject.floats, list(ids), keep)
    return np.load(target)


def _prepare_gguf(subject: Subject, names: Sequence[str], threads: int, make: Callable[..., None]) -> None:
    wanted = [name for name in names if not path_of(name, subject).exists()]
    if not wanted:
        return
    floats = subject.cache / "float.gguf"
    make(floats, gguf_file.write_gguf, subject.floats)
    for name in wanted:
        make(path_of(name, subject), gguf_file.quantize, floats, _FILE_TYPES[name], threads)
    floats.unlink()


def _make(target: Path, threads: int, say: Callable[[str], None], function: Callable[..., None], *given: Any) -> None:
    """Have a function write a file or folder, its last argument, in a process of its own; nothing where it is there."""
    if target.exists():
        return
    say(f"making {target}")
    part = target.with_name(f"part-{target.name}")
    if part.is_dir():
        shutil.rmtree(part)
    part.unlink(missing_ok=True)
    call_apart(_call, threads, function, *given, part)
    part.rename(target)


def _call(threads: int, function: Callable[..., None], *arguments: Any) -> None:
    import torch

    set_up_torch(threads)
    with torch.inference_mode():
        function(*arguments)


def _write_reference(floats: Path, ids: list[int], keep: int, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32).eval()
    with open(target, "wb") as file:
        np.save(file, model(torch.tensor([ids]), logits_to_keep=keep).logits[0].numpy())
