"""Run engines over windows and collect what each predicted, what it cost and how long it took.

`score` is one teacher-forced pass; `decode` prefills and then feeds one token at a time, as generation does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quicksilver.core.trace import Trace
from quicksilver.measure.windows import Window
from quicksilver.runtime.loop import Decoder

Mode = Literal["score", "decode"]
MIN_TIMINGS = 5
_HEAD_ROWS = 256  # rows of logits held at a time, for each engine


@dataclass
class EngineRecord:
    """What one engine did over all windows."""

    decoder: Decoder  # the engine
    trace: Trace  # counts over the scored pass (`score`) or over the decode steps (`decode`)
    prompt_trace: Trace  # counts over the prompts fed before, where there are any
    nll: list[float] = field(default_factory=list)  # total negative log-likelihood of each window, nats
    kl: float = 0.0  # sum over scored tokens of KL(dense || this), nats
    agreed: int = 0  # scored tokens whose most likely token equals the dense model's
    kv_bytes: list[int] = field(default_factory=list)  # bytes allocated for the cache after each window
    kv_used_bytes: list[int] = field(default_factory=list)  # of these, bytes of what is held
    seconds: list[float] = field(default_factory=list)  # of each timed run of a window, without its prompt
    prompt_seconds: list[float] = field(default_factory=list)  # of the prompts


@dataclass
class _Clock:
    """Seconds of work on a device, summed over `with` blocks."""

    device: torch.device
    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds += time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run_windows(
    decoders: list[Decoder], windows: Iterable[Window], mode: Mode, on_window: Callable[[], None] = lambda: None
) -> list[EngineRecord]:
    """Run every engine over every window, interleaved; the first engine is the baseline.

    A first run of the first window is a warm-up and counts nowhere. With fewer than five windows further
    rounds are run for their timings only. `on_window` is called after each of them all, `num_runs` times.
    """
    windows = list(windows)
    records = [new_record(decoder) for decoder in decoders]

    def run(into: list[EngineRecord], window: Window) -> None:
        compare(into, [feed(record, window, mode) for record in into], window)
        on_window()

    run([new_record(decoder) for decoder in decoders], windows[0])
    for window in windows:
        run(records, window)
    for _ in range(_num_rounds(len(windows)) - 1):
        for window in windows:
            again = [new_record(decoder) for decoder in decoders]
            run(again, window)
            for record, timed in zip(records, again, strict=True):
                record.seconds += timed.seconds
                record.prompt_seconds += timed.prompt_seconds
    return records


def num_runs(num_windows: int) -> int:
    """Return how often `run_windows` runs a window, given so many."""
    return 1 + num_windows * _num_rounds(num_windows)


def _num_rounds(num_windows: int) -> int:
    return -(-MIN_TIMINGS // num_windows)


def new_record(decoder: Decoder) -> EngineRecord:
    """Return an empty record of an engine."""
    return EngineRecord(decoder, decoder.new_trace(), decoder.new_trace())


def compare(records: list[EngineRecord], fed: list[Fed], window: Window) -> None:
    """Apply the engines' heads to what `feed` gave of one window; add what they predicted to their records."""
    token_ids = torch.tensor(window.token_ids, device=records[0].decoder.spec.device)
    prompt = len(token_ids) - 1 - fed[0].states.shape[0]
    for record in records:
        record.nll.append(0.0)
    if prompt:  # the prompt's last token predicts the first one scored
        last = [each.prompt_state for each in fed]
        _compare(records, _logits(records, [each.prompt_clock for each in fed], last, True), token_ids[prompt:][:1])
    first_row = max(window.first_scored - 1 - prompt, 0)  # rows before it are context, in `score` only
    targets = token_ids[prompt + 1 :]
    for start in range(0, fed[0].states.shape[0], _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        logits = _logits(records, [each.clock for each in fed], [each.states[rows] for each in fed], False)
        skipped = max(first_row - start, 0)
        _compare(records, [each[skipped:] for each in logits], targets[rows][skipped:])
    for record, each in zip(records, fed, strict=True):
        record.seconds.append(each.clock.seconds)
        record.prompt_seconds.append(each.prompt_clock.seconds)


class Fed(NamedTuple):
    """What one engine gave for a window, and the clocks that ran meanwhile."""

    prompt_state: Tensor  # [1, d] of the prompt's last token; [0, d] without a prompt
    states: Tensor  # [n, d] of the tokens after it
    prompt_clock: _Clock  # of the prompt
    clock: _Clock  # of the rest


def feed(record: EngineRecord, window: Window, mode: Mode) -> Fed:
    """Run an engine over one window, but for its head, the prompt at once; add what it cost to its record."""
    decoder, spec = record.decoder, record.decoder.spec
    token_ids = torch.tensor(window.token_ids, device=spec.device)
    prompt = window.prompt if mode == "score" else window.first_scored
    prompt = min(prompt, len(token_ids) - 2)  # at least one token is fed after it, so that there is something to time
    clocks, cache = (_Clock(spec.device), _Clock(spec.device)), decoder.new_cache(1)
    prompt_state = torch.empty((0, spec.hidden_size), dtype=spec.dtype, device=spec.device)
    if prompt:
        with clocks[0].running():
            prompt_state = decoder.run(token_ids[:prompt], [prompt], cache, record.prompt_trace, prompt=True)[-1:]
    parts = token_ids[prompt:-1].split(len(token_ids) if mode == "score" else 1)
    with clocks[1].running():
        states = [decoder.run(part, [len(part)], cache, record.trace) for part in parts]
    record.kv_bytes.append(cache.nbytes)
    record.kv_used_bytes.append(cache.used_nbytes)
    return Fed(prompt_state, torch.cat(states), *clocks)


def _logits(records: list[EngineRecord], clocks: list[_Clock], states: list[Tensor], of_prompt: bool) -> list[Tensor]:
    """Apply each engine's head to its states, timed and counted with the prompt or with what follows it."""
    logits = []
    for record, clock, state in zip(records, clocks, states, strict=True):
        with clock.running():
            logits.append(record.decoder.logits(state, record.prompt_trace if of_prompt else record.trace))
    return logits


def _compare(records: list[EngineRecord], logits: list[Tensor], targets: Tensor) -> None:
    """Add one block's losses, divergences and agreements; logits are [m, vocab] for each engine."""
    if targets.shape[0] == 0:
        return
    baseline = torch.log_softmax(logits[0].float(), dim=-1)
    best = baseline.argmax(-1)
    for record, rows in zip(records, logits, strict=True):
        log_probs = baseline if rows is logits[0] else torch.log_softmax(rows.float(), dim=-1)
        picked = log_probs.gather(1, targets[:, None]).double()
        record.nll[-1] -= float(picked.sum())
        if rows is not logits[0]:
            record.kl += float((baseline.exp() * (baseline - log_probs)).sum(-1).double().sum())
        record.agreed += int((log_probs.argmax(-1) == best).sum())
