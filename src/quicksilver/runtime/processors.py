"""Logits processors that a `GenerationConfig` asks for, of transformers' own classes and in its order.

Those that look at a row's tokens are made for the row, so that padding and neighbours do not matter.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import generation as of_transformers
from transformers.generation.logits_process import LogitNormalization, LogitsProcessor

from quicksilver.runtime.nucleus import NucleusWarper
from quicksilver.runtime.settings import Settings

PrefixFunction = Callable[[int, Tensor], list[int]]


def of_rows(
    settings: Settings,
    prompt: Tensor,
    new_tokens: int,
    padding: int = 0,
    prefix_allowed_tokens_fn: PrefixFunction | None = None,
) -> list[LogitsProcessor]:
    """Return the processors that look at tokens or at their number, for rows that begin with [R, T] unpadded tokens.

    `new_tokens` are those that a row may get, `padding` the columns before it, which `min_length` counts;
    `prefix_allowed_tokens_fn` returns what may come next, given a row's index among these and its tokens.
    """
    config, length, device = settings.config, prompt.shape[1], prompt.device
    eos = torch.tensor(settings.eos_token_ids, device=device) if settings.eos_token_ids else None
    made: list[LogitsProcessor] = []

    def add(name: str, *arguments: Any, when: Any = True, **options: Any) -> None:
        if when:
            kind = getattr(of_transformers, name)
            known = inspect.signature(kind.__init__).parameters  # some releases do without a device
            made.append(kind(*arguments, **{key: value for key, value in options.items() if key in known}))

    add("SequenceBiasLogitsProcessor", config.sequence_bias, when=config.sequence_bias is not None)
    penalty = config.encoder_repetition_penalty
    add("EncoderRepetitionPenaltyLogitsProcessor", penalty, prompt, when=penalty not in (None, 1.0))
    penalty = config.repetition_penalty
    add("RepetitionPenaltyLogitsProcessor", penalty, when=penalty not in (None, 1.0))
    add("NoRepeatNGramLogitsProcessor", config.no_repeat_ngram_size, when=config.no_repeat_ngram_size)
    size = config.encoder_no_repeat_ngram_size
    add("EncoderNoRepeatNGramLogitsProcessor", size, prompt, when=size)
    add("NoBadWordsLogitsProcessor", config.bad_words_ids, eos, when=config.bad_words_ids is not None)
    ends = eos is not None
    least = max((config.min_length or 0) - padding, 0)
    add("MinLengthLogitsProcessor", least, eos, device=device, when=ends and least)
    least = config.min_new_tokens
    add("MinNewTokensLengthLogitsProcessor", length, least, eos, device=device, when=ends and least)
    allowed = prefix_allowed_tokens_fn
    add("PrefixConstrainedLogitsProcessor", allowed, 1, when=allowed is not None)
    first = config.forced_bos_token_id
    add("ForcedBOSTokenLogitsProcessor", first, when=first is not None)
    last = config.forced_eos_token_id
    add("ForcedEOSTokenLogitsProcessor", length + new_tokens, last, device=device, when=last is not None)
    add("InfNanRemoveLogitsProcessor", when=config.remove_invalid_values)
    decay = config.exponential_decay_length_penalty
    add("ExponentialDecayLengthPenalty", decay, eos, length, when=decay is not None)
    tokens = config.suppress_tokens
    add("SuppressTokensLogitsProcessor", tokens, device=device, when=tokens is not None)
    tokens, begin = config.begin_suppress_tokens, length if length > 1 or first is None else length + 1
    add("SuppressTokensAtBeginLogitsProcessor", tokens, begin, device=device, when=tokens is not None)
    return made


def warpers(settings: Settings, vocab_size: int, device: torch.device) -> list[LogitsProcessor]:
    """Return what comes after the caller's own processors: of sampling, which looks at scores, and a watermark."""
    config = settings.config
    kinds = [
        ("TemperatureLogitsWarper", config.temperature, lambda value: value != 1.0),
        ("TopHLogitsWarper", getattr(config, "top_h", None), lambda value: True),
        ("TopKLogitsWarper", config.top_k, lambda value: value != 0),
        ("TopPLogitsWarper", config.top_p, lambda value: value < 1.0),
        ("MinPLogitsWarper", config.min_p, lambda value: True),
        ("TypicalLogitsWarper", config.typical_p, lambda value: value < 1.0),
        ("EpsilonLogitsWarper", config.epsilon_cutoff, lambda value: 0.0 < value < 1.0),
        ("EtaLogitsWarper", config.eta_cutoff, lambda value: 0.0 < value < 1.0),
    ]
    made: list[Any] = []
    if config.do_sample:
        made = [_kind(name)(value) for name, value, on in kinds if value is not None and on(value)]
    if config.watermarking_config is not None:
        made.append(config.watermarking_config.construct_processor(vocab_size, device))
    if config.renormalize_logits:
        made.append(LogitNormalization())
    return made


def _kind(name: str) -> Any:
    return NucleusWarper if name == "TopPLogitsWarper" else getattr(of_transformers, name)


def without(processors: Sequence[LogitsProcessor], given: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
    """Return processors but for those of a kind that the caller brings, which stand in for them."""
    kinds = tuple(type(each) for each in given)
    return [each for each in processors if not isinstance(each, kinds)]
