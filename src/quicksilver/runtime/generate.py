"""`generate`: a prompt, then token by token, by greedy decoding or sampling; over public parts of transformers.

Settings are resolved in `settings.py`; tokens are chosen, and rows end, in `sampling.py`. All is as in transformers,
but that a padded row gives what the row alone gives: processors and stop strings do not see padding. `max_length` and
`min_length` count columns, padding included, as there, and a caller's own processors and criteria, watermarks and
guidance see the padded batch. A row that has ended is fed its last token and no padding after it; its logits and scores
are 0 from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.stopping_criteria import MaxTimeCriteria, StoppingCriteria, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from quicksilver.cache import RaggedKVCache
from quicksilver.core.trace import Trace
from quicksilver.errors import InputError
from quicksilver.runtime.continuation import rejoin
from quicksilver.runtime.processors import PrefixFunction, of_rows, warpers, without
from quicksilver.runtime.sampling import Draw, Ending, Rows, TokenChoice
from quicksilver.runtime.settings import Settings

if TYPE_CHECKING:
    from quicksilver.runtime.generation import QuickSilverForCausalLM

_CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


@dataclass(frozen=True)
class Request:
    """A call of `generate` but for its settings; see `QuickSilverForCausalLM.generate`."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: RaggedKVCache | None
    logits_processor: Sequence[LogitsProcessor]
    stopping_criteria: Sequence[StoppingCriteria]
    prefix_allowed_tokens_fn: PrefixFunction | None
    guidance: tuple[Tensor | None, Tensor | None]
    streamer: Any
    tokenizer: Any
    seed: int | Sequence[int] | None


@torch.no_grad()
def generate(model: QuickSilverForCausalLM, settings: Settings, request: Request, trace: Trace) -> Any:
    """Return tokens [B, T + new], or transformers' output object where the settings ask for one.

    Raises:
        InputError: what `QuickSilverForCausalLM.generate` says.
    """
    config = settings.config
    feed = _Feed(model, settings, request, trace)
    repeats, mask = config.num_return_sequences, feed.mask
    ids = request.input_ids.repeat_interleave(repeats, dim=0)
    given = None if mask is None else mask[:, -ids.shape[1] :]
    real = None if given is None or bool(given.all()) else given.repeat_interleave(repeats, dim=0)
    lengths = [ids.shape[1]] * len(ids) if real is None else real.sum(1).tolist()
    seen = [before for before in feed.seen for _ in range(repeats)]
    positions = [before + length for before, length in zip(seen, lengths, strict=True)]
    left = settings.new_tokens(ids.shape[1], max(positions), model.adapter.spec.max_positions)
    rows = Rows(ids, real)
    kept: dict[str, list[Tensor]] = {
        name: []
        for name in ("scores", "logits")
        if config.return_dict_in_generate and getattr(config, f"output_{name}")
    }
    choice = _choice(model, settings, request, rows, left)
    ending = _ending(settings, request, len(ids), left, lambda: tuple(kept["scores"]) if "scores" in kept else None)
    put = (lambda tokens: None) if request.streamer is None else request.streamer.put
    put(ids.cpu())
    logits = feed.prompt(repeats)
    while True:
        logits = logits.to(ids.device, torch.float32)
        raw = logits.clone() if "logits" in kept else logits
        running = ending.running  # whose next token is not padding
        chosen, scores = choice(rows, logits, positions)
        for name, values in (("scores", scores), ("logits", raw)):
            if name in kept:
                kept[name].append(values)
        tokens = ending.fill(chosen)
        rows.append(tokens)
        ending.look(rows, tokens)
        put(tokens.cpu())
        if ending.is_over:
            break
        logits = feed.step(rows, tokens, running)
        positions = [position + 1 for position in positions]
    if not config.return_dict_in_generate:
        return rows.input_ids
    records = {name: tuple(values) for name, values in kept.items()}
    return GenerateDecoderOnlyOutput(sequences=rows.input_ids, **records, **{_CACHE: feed.cache})  # type: ignore[arg-type]


def _choice(model: QuickSilverForCausalLM, settings: Settings, request: Request, rows: Rows, left: int) -> TokenChoice:
    """Return how tokens are chosen: by processors of each part, the caller's own, and those of sampling."""
    config, own = settings.config, list(request.logits_processor)
    parts, made = rows.parts, []
    for index, part in enumerate(parts):
        prefix = request.prefix_allowed_tokens_fn
        if prefix is not None and len(parts) > 1:
            prefix = _of_row(prefix, index)
        padding = rows.input_ids.shape[1] - part.shape[1]
        made.append(without(of_rows(settings, part, left, padding, prefix), own))
    last = without(warpers(settings, model.adapter.spec.vocab_size, rows.input_ids.device), own)
    if config.guidance_scale not in (None, 1.0, 1):
        ids, mask = request.guidance
        guided = UnbatchedClassifierFreeGuidanceLogitsProcessor(
            config.guidance_scale,
            model,
            unconditional_ids=ids,  # type: ignore[arg-type]  # any whole numbers do
            unconditional_attention_mask=mask,  # type: ignore[arg-type]
        )
        own.insert(0, guided)
    return TokenChoice(made, [*own, *last], Draw(config.do_sample, _seeds(request.seed, len(rows.input_ids))))


def _of_row(prefix: PrefixFunction, row: int) -> PrefixFunction:
    return lambda _, tokens: prefix(row, tokens)


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[tuple[int, int]] | None:
    """Return each row's key: one seed for all is told apart by the row, a seed of its own says all."""
    if seed is None:
        return None
    keys = [(seed, row) for row in range(count)] if isinstance(seed, int) else [(each, 0) for each in seed]
    if len(keys) != count:
        raise InputError(f"{len(keys)} seeds were given for {count} sequences")
    if not all(isinstance(each, int) and 0 <= each < 2**64 for each, _ in keys):
        raise InputError(f"a seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")
    return keys


def _ending(settings: Settings, request: Request, count: int, left: int, scores: Any) -> Ending:
    config, own, made = settings.config, list(request.stopping_criteria), []
    if config.stop_strings is not None:
        if request.tokenizer is None:
            raise InputError("stop_strings need the model's tokenizer: generate(..., tokenizer=tokenizer)")
        made.append(StopStringCriteria(tokenizer=request.tokenizer, stop_strings=config.stop_strings))
    if config.max_time is not None:
        own.append(MaxTimeCriteria(max_time=config.max_time))
    return Ending(count, left, settings.eos_token_ids, made, own, settings.padding, scores)


@contextmanager
def told_the_end(streamer: Any) -> Iterator[None]:
    """Tell a streamer the end, whatever happens: somebody may be waiting for it in another thread."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


class _Feed:
    """What is fed to the model: the prompt, then tokens, with a cache or all again without one.

    Args:
        model: by its engine; by its call where somebody counts on calls.
        settings: what was asked for.
        request: the call.
        trace: added to.

    Attributes:
        mask: [B, P + T] bool of what was given, or inferred; None where all is real.
        seen: tokens of each row that are in a cache and not among the ids given.
        cache: extended; None where none is used.

    Raises:
        InputError: padding on the right, or a cache that does not fit.
    """

    def __init__(self, model: QuickSilverForCausalLM, settings: Settings, request: Request, trace: Trace) -> None:
        self._model, self._trace, self._request = model, trace, request
        self._chunk = settings.config.prefill_chunk_size
        ids, mask = request.input_ids, request.attention_mask
        mask = settings.inferred_mask(ids) if mask is None else mask.to(ids.device) != 0
        columns = ids.shape[1] if mask is None else mask.shape[-1]
        if mask is not None and (mask.shape != (len(ids), columns) or columns < ids.shape[1]):
            raise InputError(f"attention_mask of shape {tuple(mask.shape)} does not fit input_ids {tuple(ids.shape)}")
        if mask is not None and not bool(mask[:, -1].all()):
            raise InputError("prompts must be padded on the left (tokenizer.padding_side = 'left')")
        self.mask, self.cache = mask, request.cache
        self.seen = [0] * len(ids)
        if self.cache is None:
            if columns > ids.shape[1]:
                raise InputError(f"attention_mask has {columns} columns for {ids.shape[1]} of input_ids and no cache")
            self.cache = model.decoder.new_cache(len(ids)) if settings.config.use_cache else None
            return
        if not settings.config.use_cache:
            raise InputError("a cache was given, and use_cache=False says not to use one; leave out one of them")
        model.decoder.check_cache(self.cache, len(ids))
        rejoin(self.cache, ids, mask, columns)
        if columns > ids.shape[1]:  # the new tokens alone were given
            self.seen = mask[:, : -ids.shape[1]].sum(1).tolist()  # type: ignore[index]

    def prompt(self, repeats: int) -> Tensor:
        """Feed the prompt; return the logits of what follows, [B * repeats, vocab], rows and cache repeated."""
        ids, mask, cache = self._request.input_ids, self.mask, self.cache
        if cache is None:
            self._real = mask if mask is None else mask.repeat_interleave(repeats, dim=0)
            return self._whole(ids, mask).repeat_interleave(repeats, dim=0)
        before = cache.fed.count
        columns = ids.shape[1] if mask is None else mask.shape[1]
        ids = ids[:, before - columns :] if before < columns else ids
        position_ids, done, logits = self._request.position_ids, before, None
        for chunk in ids.split(self._chunk or ids.shape[1], dim=1):
            done += chunk.shape[1]
            own = None if position_ids is None else position_ids[..., : position_ids.shape[-1] + done - columns]
            logits = self._call(
                chunk,
                None if mask is None else mask[:, :done],
                cache,
                prompt=True,
                position_ids=None if own is None else own[..., -chunk.shape[1] :],
            )
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        assert logits is not None
        return logits.repeat_interleave(repeats, dim=0)

    def step(self, rows: Rows, tokens: Tensor, running: Sequence[bool]) -> Tensor:
        """Feed new tokens [B], but for padding; return the logits of what follows, [B, vocab]."""
        whole = all(running)
        if self.cache is None:
            return self._again(rows, running)
        model, cache, spec = self._model, self.cache, self._model.adapter.spec
        mask = None if whole else torch.tensor(running, device=model.device)
        if model.is_watched:
            return self._call(tokens[:, None], None if mask is None else mask[:, None], cache, prompt=False)
        tokens = tokens.to(model.device)
        fed = tokens if mask is None else tokens[mask]
        hidden = model.decoder.run(fed, [int(runs) for runs in running], cache, self._trace)
        cache.fed.append(tokens[:, None], None if mask is None else mask[:, None])
        logits = model.decoder.logits(hidden, self._trace)
        if mask is None:
            return logits
        spread = logits.new_zeros((len(running), spec.vocab_size))
        spread[mask] = logits
        return spread

    def _again(self, rows: Rows, running: Sequence[bool]) -> Tensor:
        """Feed all tokens again."""
        ids, real = rows.input_ids, self._real
        if real is None and all(running):
            return self._whole(ids, None)
        real = ids.new_ones((len(ids), ids.shape[1] - 1), dtype=torch.bool) if real is None else real
        self._real = torch.cat((real, torch.tensor(running, device=ids.device)[:, None]), dim=1)
        return self._whole(ids, self._real)

    def _whole(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Feed tokens to no cache; not as a prompt, since every step must find them as they were."""
        return self._call(ids, mask, None, prompt=False)

    def _call(self, ids: Tensor, mask: Tensor | None, cache: RaggedKVCache | None, **options: Any) -> Tensor:
        """Return the logits after the last column by a call of the model, which hooks on it see."""
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
            trace=self._trace,
            **options,
        )
        return output.logits[:, -1]
