"""llama.cpp through llama-cpp-python's low-level calls: one C call per pass, nothing of Python's samplers or lists.

It does without PyTorch, so that a process that runs llama.cpp has one OpenMP in it: the one that llama.cpp uses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Case, interleaved

_TRIALS, _TRIAL_PROMPT, _TRIAL_TOKENS = 2, 64, 8


@cache
def library() -> tuple[Any, Any]:
    """Return llama-cpp-python's low-level calls, and the logger that C calls from then on, which says nothing."""
    from llama_cpp import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    return lib, quiet


class LlamaCpp:
    """A GGUF file, memory-mapped, with float16 keys and values as by default.

    There are two contexts over the same weights, with and without flash attention; `tune` takes the faster one for
    each task.

    Args:
        name: as in rows.
        baseline: the engine it is compared with.
        path: the file.
        threads: for single tokens and for batches alike.
        context: tokens that fit.
    """

    def __init__(self, name: str, baseline: str, path: Path, threads: int, context: int) -> None:
        lib, _ = library()
        self.name, self.baseline = name, baseline
        self.weight_bytes = float(_bytes_read(path))
        self._lib, self._size = lib, context
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
        self._model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._contexts = {flash: self._context(threads, flash) for flash in (False, True)}
        self._flash = {"prefill": False, "decode": False}
        self._prefilled: Any = None  # the context that `prefill` fed last
        self._batch = self._new_batch()
        self._sampler = lib.llama_sampler_init_greedy()
        self.details: dict[str, Any] = {"system": lib.llama_print_system_info().decode().strip()}

    def tune(self, ids: Sequence[int], prompt: int, prefill: int) -> None:
        """Time a prompt, and a few tokens after its start, with flash attention and without; keep the faster for each.

        Args:
            ids: tokens of a text.
            prompt: not used.
            prefill: tokens of the prompt.
        """
        cases = [case for flash in (False, True) for case in self._trials(flash, ids[:prefill])]
        seconds = interleaved(cases, _TRIALS, warmup=1)
        self._flash = {task: min(seconds[f"{task} True"]) < min(seconds[f"{task} False"]) for task in self._flash}
        self.details["flash_attention"] = dict(self._flash)

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

    def _trials(self, flash: bool, prompt: Sequence[int]) -> tuple[Case, Case]:
        """Return a prefill and some decoding to time, with flash attention or without."""

        def switched(prepare: Callable[[], Any] = lambda: None) -> Any:
            self._flash = dict.fromkeys(self._flash, flash)
            return prepare()

        start, fed = prompt[:_TRIAL_PROMPT], prompt[:_TRIAL_TOKENS]
        return (
            Case(f"prefill {flash}", switched, lambda _: self.prefill(prompt)),
            Case(f"decode {flash}", lambda: switched(lambda: self.start(start)), lambda state: self.decode(state, fed)),
        )

    def _context(self, threads: int, flash: bool) -> Any:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self._size
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
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
        context = self._contexts[self._flash[task]]
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


def load(files: Sequence[tuple[str, Path]], baseline: str, threads: int, context: int) -> list[LlamaCpp]:
    """Return an engine for each file, by name."""
    return [LlamaCpp(name, baseline, path, threads, context) for name, path in files]


def _bytes_read(path: Path) -> int:
    """Return the bytes of the tensors that a decoded token reads whole: all but tables of which it reads a row."""
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    rows = {"position_embd.weight"} | ({"token_embd.weight"} if "output.weight" in sizes else set())
    return sum(size for name, size in sizes.items() if name not in rows)
