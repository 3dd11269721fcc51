"""llama.cpp through llama-cpp-python's low-level calls: one C call per pass, nothing of Python's samplers or lists.

It does without PyTorch, so that a process that runs llama.cpp has one OpenMP in it: the one that llama.cpp uses.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.timing import Case, interleaved

_TRIALS, _TRIAL_PROMPT, _TRIAL_TOKENS = 2, 64, 8
_BATCH = 512  # tokens computed at a time, llama.cpp's default


@cache
def library() -> tuple[Any, Any]:
    """Return llama-cpp-python's low-level calls, and the logger that C calls from then on, which says nothing."""
    from llama_cpp import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    return lib, quiet


class Setting(NamedTuple):
    """How a context computes: with flash attention or without, and how many tokens at a time (`n_ubatch`)."""

    flash: bool
    batch: int = _BATCH


class LlamaCpp:
    """A GGUF file, memory-mapped, with float16 keys and values as by default.

    There is a context for each setting over the same weights; `tune` takes the fastest one for each task.

    Args:
        name: as in rows.
        baseline: the engine it is compared with.
        path: the file.
        threads: for single tokens and for batches alike.
        context: tokens that fit.
        settings: those to be tried.
    """

    def __init__(
        self,
        name: str,
        baseline: str,
        path: Path,
        threads: int,
        context: int,
        settings: Sequence[Setting] = (Setting(False), Setting(True)),
    ) -> None:
        lib, _ = library()
        self.name, self.baseline = name, baseline
        self.weight_bytes = 0.0
        self._lib, self._path, self._size = lib, path, context
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
        self._model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._contexts = {setting: self._context(threads, setting) for setting in settings}
        self._chosen = dict.fromkeys(("prefill", "decode"), settings[0])
        self._prefilled: Any = None  # the context that `prefill` fed last
        self._batch = self._new_batch()
        self._sampler = lib.llama_sampler_init_greedy()
        self.details: dict[str, Any] = {"system": lib.llama_print_system_info().decode().strip()}

    def tune(self, ids: Sequence[int], prompt: int, prefill: int) -> None:
        """Time a prompt, and a few tokens after its start, under each setting; keep the fastest for each task.

        Args:
            ids: tokens of a text.
            prompt: not used.
            prefill: tokens of the prompt.
        """
        self.weight_bytes = float(_bytes_read(self._path))
        cases = [case for setting in self._contexts for case in self._trials(setting, ids[:prefill])]
        seconds = interleaved(cases, _TRIALS, warmup=1)
        self._chosen = {
            task: min(self._contexts, key=lambda setting: min(seconds[f"{task} {setting}"])) for task in self._chosen
        }
        self.details["flash_attention"] = {task: setting.flash for task, setting in self._chosen.items()}
        self.details["n_ubatch"] = self._chosen["prefill"].batch

    def logits(self, ids: Sequence[int], singly: int) -> np.ndarray:
        """Return every token's logits, [T, vocab] float32."""
        context = self._emptied("decode")
        at_once = len(ids) - singly
        parts = []
        for start, stop in [(0, at_once), *((i, i + 1) for i in range(at_once, len(ids)))]:
            self._feed(context, ids[start:stop], start, all_logits=True)
            pointer = self._lib.llama_get_logits(context)
            parts.append(np.ctypeslib.as_array(pointer, (stop - start, self._vocab_size)).copy())
        return np.concatenate(parts)

    def prefill(self, ids: Sequence[int]) -> None:
        """Feed a prompt in one batch."""
        self._prefilled = self._emptied("prefill")
        self._feed(self._prefilled, ids, 0)

    def prefilled(self) -> np.ndarray:
        """Return the logits that the last call of `prefill` left in its context, [1, vocab] float32."""
        pointer = self._lib.llama_get_logits_ith(self._prefilled, -1)
        return np.ctypeslib.as_array(pointer, (1, self._vocab_size)).copy()

    def start(self, prompt: Sequence[int]) -> tuple[Any, int]:
        """Feed a prompt; return the context and how many tokens it holds."""
        context = self._emptied("decode")
        self._feed(context, prompt, 0)
        return context, len(prompt)

    def decode(self, state: tuple[Any, int], ids: Sequence[int]) -> None:
        """Feed the ids, one at a time."""
        context, position = state
        for i, token in enumerate(ids):
            self._feed_one(context, token, position + i)

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return `count` tokens of its own greedy sampler."""
        context, position = self.start(prompt)
        tokens = [self._lib.llama_sampler_sample(self._sampler, context, -1)]
        while len(tokens) < count:
            self._feed_one(context, tokens[-1], position + len(tokens) - 1)
            tokens.append(self._lib.llama_sampler_sample(self._sampler, context, -1))
        return tokens

    def _trials(self, setting: Setting, prompt: Sequence[int]) -> tuple[Case, Case]:
        """Return a prefill and some decoding to time under a setting."""

        def switched(prepare: Callable[[], Any] = lambda: None) -> Any:
            self._chosen = dict.fromkeys(self._chosen, setting)
            return prepare()

        start, fed = prompt[:_TRIAL_PROMPT], prompt[:_TRIAL_TOKENS]
        return (
            Case(f"prefill {setting}", switched, lambda _: self.prefill(prompt)),
            Case(
                f"decode {setting}", lambda: switched(lambda: self.start(start)), lambda state: self.decode(state, fed)
            ),
        )

    def _context(self, threads: int, setting: Setting) -> Any:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = self._size
        params.n_ubatch = min(setting.batch, self._size)
        params.n_threads = params.n_threads_batch = threads
        enabled, disabled = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = enabled if setting.flash else disabled
        params.no_perf = True
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context")
        return context

    def _new_batch(self) -> Any:
        """Return a batch whose tokens all belong to sequence 0."""
        batch = self._lib.llama_batch_init(self._size, 0, 1)
        for i in range(self._size):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
        return batch

    def _emptied(self, task: str) -> Any:
        context = self._contexts[self._chosen[task]]
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), False)
        return context

    def _feed(self, context: Any, ids: Sequence[int], start: int, all_logits: bool = False) -> None:
        """Run tokens at positions from `start` on, in one call."""
        batch, count = self._batch, len(ids)
        tokens = np.asarray(ids, dtype=np.int32)
        positions = np.arange(start, start + count, dtype=np.int32)
        ctypes.memmove(batch.token, tokens.ctypes.data, tokens.nbytes)
        ctypes.memmove(batch.pos, positions.ctypes.data, positions.nbytes)
        ctypes.memset(batch.logits, int(all_logits), count)
        batch.logits[count - 1] = 1
        self._decode(context, count)

    def _feed_one(self, context: Any, token: int, position: int) -> None:
        batch = self._batch
        batch.token[0], batch.pos[0], batch.logits[0] = token, position, 1
        self._decode(context, 1)

    def _decode(self, context: Any, count: int) -> None:
        self._batch.n_tokens = count
        if self._lib.llama_decode(context, self._batch):
            raise RuntimeError(f"{self.name}: llama.cpp did not run {count} tokens")
        self._lib.llama_synchronize(context)


class HeldLlamaCpp(LlamaCpp):
    """The same, but `start` keeps what is held already of a prompt, so that a long one is fed once.

    Args:
        args, kwargs: as a `LlamaCpp`'s.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: list[int] = []

    def start(self, prompt: Sequence[int]) -> tuple[Any, int]:
        """Forget what follows the prompt, feed what is missing; return the context and how many tokens it holds."""
        context, kept = self._contexts[self._chosen["decode"]], len(self._held)
        if not kept or self._held != list(prompt[:kept]):
            context, kept = self._emptied("decode"), 0
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(context), 0, kept, -1)
        if kept < len(prompt):
            self._feed(context, prompt[kept:], kept)
        self._held = list(prompt)
        return context, len(prompt)

    def _emptied(self, task: str) -> Any:
        self._held = []
        return super()._emptied(task)


def load_held(name: str, path: Path, threads: int, context: int, batches: Sequence[int]) -> list[HeldLlamaCpp]:
    """Return an engine of one file that is compared with nobody, `batches` tokens at a time to be tried."""
    settings = [Setting(flash, batch) for batch in batches for flash in (False, True)]
    return [HeldLlamaCpp(name, name, path, threads, context, settings)]


def seconds_to_load(path: Path, threads: int, context: int) -> float:
    """Return the seconds until a file's model can be used."""
    library()
    start = time.perf_counter()
    LlamaCpp("", "", path, threads, context, (Setting(True),))
    return time.perf_counter() - start


def load(files: Sequence[tuple[str, Path]], baseline: str, threads: int, context: int) -> list[LlamaCpp]:
    """Return an engine for each file, by name."""
    return [LlamaCpp(name, baseline, path, threads, context) for name, path in files]


def _bytes_read(path: Path) -> int:
    """Return the bytes of the tensors that a decoded token reads whole: all but tables of which it reads a row."""
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    rows = {"position_embd.weight"} | ({"token_embd.weight"} if "output.weight" in sizes else set())
    return sum(size for name, size in sizes.items() if name not in rows)
