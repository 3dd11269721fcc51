"""`generate`: a prompt, then token by token, by greedy decoding or sampling; over public parts of transformers.

Settings are resolved in `settings.py`; tokens are chosen, and rows end, in `sampling.py`. A padded row gives what the
row alone gives, where transformers lets processors and stop strings see padding. As there, `max_length` and
`min_length` count columns, padding included, and a caller's own processors and criteria, watermarks and guidance see
the padded batch. A row that has ended is fed its last token and no padding after it; its logits are 0 from there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from quicksilver.cache import RaggedKVCache
from quicksilver.core.trace import Trace
from quicksilver.errors import InputError
from quicksilver.runtime.processors import PrefixFunction, of_rows, warpers, without
from quicksilver.runtime.sampling import Draw, Ending, Rows, TokenChoice
from quicksilver.runtime.settings import Settings
from quicksilver.runtime.unpadded import check_positions, real_tokens

if TYPE_CHECKING:
    from quicksilver.model import QuickSilverForCausalLM

CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers' outputs call the cache: `cache` from 5.24 on. Callers may use either name."""


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
    """Return tokens [B, T + new], or transformers' output object where the settings ask for one; errors as there."""
    config = settings.config
    feed = _Feed(model, settings, request, trace)
    repeats, mask = config.num_return_sequences, feed.mask
    ids = request.input_ids.repeat_interleave(repeats, dim=0)
    given = None if mask is None else mask[:, -ids.shape[1] :]
    real = None if given is None or bool(given.all()) else given.repeat_interleave(repeats, dim=0)
    lengths = [ids.shape[1]] * len(ids) if real is None else real.sum(1).tolist()
    seen = [before for before in feed.seen for _ in range(repeats)]
    positions = [before + length for before, length in zip(seen, lengths, strict=True)]
    own_limits = [each.max_length for each in request.stopping_criteria if type(each) is MaxLengthCriteria]
    left = settings.new_tokens(
        ids.shape[1], max(positions), model.adapter.spec.max_positions, min(own_limits, default=None)
    )
    rows = Rows(ids, real)
    kept: dict[str, list[Tensor]] = {
        name: []
        for name in ("scores", "logits")
        if config.return_dict_in_generate and getattr(config, f"output_{name}")
    }
    choice = _choice(model, settings, request, rows, left)
    ending = _ending(settings, request, len(ids), left, lambda: tuple(kept["scores"]) if "scores" in kept else None)
    put = _putter(request.streamer)
    put(ids)
    logits = feed.prompt(repeats)
    while True:
        logits = logits.to(ids.device, torch.float32)
        raw = logits.clone() if "logits" in kept else logits
        running = ending.running  # whose next token is not padding
        chosen, scores = choice(rows, logits, positions)
        for name, values in (("scores", scores), ("logits", raw)):
            if name in kept:
                kept[name].append(values)
        tokens = ending.fill(chosen, running)
        rows.append(tokens)
        ending.look(rows, tokens)
        put(tokens)
        if ending.is_over:
            break
        logits = feed.step(rows, tokens, running)
        positions = [position + 1 for position in positions]
    if not config.return_dict_in_generate:
        return rows.input_ids
    records = {name: tuple(values) for name, values in kept.items()}
    return GenerateDecoderOnlyOutput(sequences=rows.input_ids, **records, **{CACHE_FIELD: feed.cache})  # type: ignore[arg-type]


def _choice(model: QuickSilverForCausalLM, settings: Settings, request: Request, rows: Rows, left: int) -> TokenChoice:
    """Return how tokens are chosen: by processors of each part, the caller's own, and those of sampling."""
    config, own, first = settings.config, list(request.logits_processor), []
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
        first.append(guided)
    return TokenChoice(first, made, [*own, *last], Draw(config.do_sample, _seeds(request.seed, len(rows.input_ids))))


def _of_row(prefix: PrefixFunction, row: int) -> PrefixFunction:
    return lambda _, tokens: prefix(row, tokens)


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[tuple[int, int]] | None:
    """Return each row's key: one seed for all is told apart by the row, a seed of its own says all."""
    if seed is None:
        return None
    try:
        each = [operator.index(one) for one in seed] if isinstance(seed, Sequence) else [operator.index(seed)] * count
    except TypeError:
        each = [-1]
    if not all(0 <= one < 2**64 for one in each):
        raise InputError(f"a seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")
    if len(each) != count:
        raise InputError(f"{len(each)} seeds were given for {count} sequences")
    return [(one, 0 if isinstance(seed, Sequence) else row) for row, one in enumerate(each)]


def _ending(settings: Settings, request: Request, count: int, left: int, scores: Any) -> Ending:
    """Return when rows end; criteria of the caller's stand in for those of their kind that settings ask for."""
    config, own = settings.config, list(request.stopping_criteria)
    kinds, made = {type(each) for each in own}, []
    if config.stop_strings is not None and StopStringCriteria not in kinds:
        if request.tokenizer is None:
            raise InputError("stop_strings need the model's tokenizer: generate(..., tokenizer=tokenizer)")
        made.append(StopStringCriteria(tokenizer=request.tokenizer, stop_strings=config.stop_strings))
    if config.max_time is not None and MaxTimeCriteria not in kinds:
        own.append(MaxTimeCriteria(max_time=config.max_time))
    eos = () if EosTokenCriteria in kinds else settings.eos_token_ids
    fills = bool(eos) or any(hasattr(each, "eos_token_id") for each in own)
    return Ending([False] * count, left, frozenset(eos), made, own, settings.padding if fills else None, scores)


def _putter(streamer: Any) -> Callable[[Tensor], None]:
    """Return what gives tokens to a streamer, on the CPU; where there is none, nobody waits for the device."""
    if streamer is None:
        return lambda tokens: None
    return lambda tokens: streamer.put(tokens.cpu())


@contextmanager
def told_the_end(streamer: Any) -> Iterator[None]:
    """Tell a streamer the end, whatever happens: somebody may be waiting for it in another thread."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


class _Feed:
    """What is fed to the engine, or by calls that somebody counts on: prompt, tokens; all again without a cache."""

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
        self.mask, self.cache = mask, request.cache  # [B, P + T] bool, None where all is real
        self.seen = [0] * len(ids)  # tokens of each row that are in a cache and not among the ids given
        if self.cache is None:
            if columns > ids.shape[1]:
                raise InputError(f"attention_mask has {columns} columns for {ids.shape[1]} of input_ids and no cache")
            self.cache = model.decoder.new_cache(len(ids)) if settings.config.use_cache else None
        else:
            self._check_cache(self.cache, settings, columns)
        if request.position_ids is not None:
            given = None if self.mask is None else self.mask[:, -ids.shape[1] :]
            check_positions(request.position_ids, real_tokens(ids, given), self.seen)

    def _check_cache(self, cache: RaggedKVCache, settings: Settings, columns: int) -> None:
        """Refuse a cache that does not fit; nothing of it is taken back before all else is known to be right."""
        ids, fed = self._request.input_ids, cache.fed
        if not settings.config.use_cache:
            raise InputError("a cache was given, and use_cache=False says not to use one; leave out one of them")
        self._model.decoder.check_caches(cache.sequences, len(ids))
        if columns > ids.shape[1]:  # the new tokens alone were given
            if columns != fed.count + ids.shape[1]:
                raise InputError(
                    f"attention_mask has {columns} columns; the cache holds {fed.count}, and {ids.shape[1]} are new"
                )
            self.seen = self.mask[:, : -ids.shape[1]].sum(1).tolist()  # type: ignore[index]
            return
        _check_beginning(cache, ids, self.mask)
        if self.mask is None and fed.real is not None:  # what was padding is no token of the prompt
            new = fed.real.new_ones((len(ids), ids.shape[1] - fed.count))
            self.mask = torch.cat((fed.real, new), dim=1).to(ids.device)

    def prompt(self, repeats: int) -> Tensor:
        """Feed the prompt; return the logits of what follows, [B * repeats, vocab], rows and cache repeated."""
        ids, mask, cache = self._request.input_ids, self.mask, self.cache
        if cache is None:
            self._real = mask if mask is None else mask.repeat_interleave(repeats, dim=0)
            return self._whole(ids, mask).repeat_interleave(repeats, dim=0)
        columns = ids.shape[1] if mask is None else mask.shape[1]
        if columns == cache.fed.count:  # the last column is fed again; all of them where tokens are fused there
            try:
                cache.crop(-1)
            except InputError:
                cache.reset()
        done = cache.fed.count
        *earlier, last = ids[:, done - columns :].split(self._chunk or columns, dim=1)
        for chunk in earlier:  # nobody asks what these predict
            done += chunk.shape[1]
            self._call(chunk, None if mask is None else mask[:, :done], cache, prompt=True, logits_to_keep=slice(0, 0))
        logits = self._call(last, mask, cache, prompt=True)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        return logits.repeat_interleave(repeats, dim=0)

    def step(self, rows: Rows, tokens: Tensor, running: Sequence[bool]) -> Tensor:
        """Feed new tokens [B], but for padding; return the logits of what follows, [B, vocab]."""
        model, cache, trace = self._model, self.cache, self._trace
        if cache is None:
            return self._again(rows, running)
        tokens = tokens.to(model.device)
        real = None if all(running) else torch.tensor(running, device=model.device)
        columns = tokens[:, None], None if real is None else real[:, None]
        if model.is_watched:
            return self._call(*columns, cache, prompt=False)
        fed = tokens if real is None else tokens[real]
        hidden = model.decoder.run(fed, [1] * fed.shape[0], list(compress(cache.sequences, running)), trace)
        cache.fed.append(*columns)
        logits = model.decoder.logits(hidden, trace)
        if real is None:
            return logits
        trace.record_cache(cache.nbytes, cache.used_nbytes, cache.num_entries)  # those that have ended, too
        return logits.new_zeros((len(running), logits.shape[1])).masked_scatter_(real[:, None], logits)

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
        options = {"logits_to_keep": 1, "trace": self._trace, "use_cache": cache is not None} | options
        logits = self._model(input_ids=ids, attention_mask=mask, past_key_values=cache, **options).logits
        return logits[:, -1] if logits.shape[1] else logits


def _check_beginning(cache: RaggedKVCache, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise InputError where a prompt, [B, T] with a mask [B, T] or None, does not begin with what a cache holds."""
    cache.check_columns()
    seen, columns = cache.fed.count, input_ids.shape[1]
    remedy = "give all token ids so far, or the new ones alone with an attention_mask over both"
    if columns < seen:
        raise InputError(
            f"the cache holds {seen} columns and the prompt {columns}: the cache is not its beginning; {remedy}"
        )
    differs = input_ids[:, :seen].to(cache.shape.device) != cache.fed.token_ids
    for real in (cache.fed.real, attention_mask):
        if real is not None:
            differs &= real[:, :seen].to(differs.device) != 0
    if bool(differs.any()):
        row, column = differs.nonzero()[0].tolist()
        raise InputError(
            f"the cache is not the beginning of the prompt: in row {row} they differ at column {column}; {remedy}"
        )
