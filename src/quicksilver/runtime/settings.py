"""What `generate` is asked for: a `GenerationConfig`, resolved as transformers resolves it, and what it cannot do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from quicksilver.core.checks import is_whole
from quicksilver.errors import InputError, UnsupportedFeatureError

_DEFAULTS = {
    "do_sample": False,
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}
"""What transformers takes where neither the call nor the model says otherwise; the rest is off."""
_NEW_TOKENS = 20
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_OTHER_WAYS = {
    "prompt_lookup_num_tokens": "assisted generation",
    "assistant_early_exit": "assisted generation",
    "use_mtp": "assisted generation",
    "dola_layers": "decoding by contrasting layers (dola_layers)",
    "speculation_type": "speculation (speculation_type)",
}
"""Fields, of some releases of transformers, each of which asks for another way of decoding."""
_OUTPUTS = ("output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Settings:
    """What a call asks for."""

    config: Any  # of the call, a copy
    eos_token_ids: tuple[int, ...]  # tokens that end a sequence; none where the configuration has none
    padding: int | None  # token that fills a sequence which has ended; None where neither padding nor EOS is configured
    own_max_length: bool  # nobody has said how long the result may be

    @classmethod
    def resolve(
        cls, given: GenerationConfig | None, of_model: GenerationConfig, arguments: Mapping[str, Any]
    ) -> tuple[Settings, dict[str, Any]]:
        """Return what a call asks for: its arguments before its configuration, that before the model's own.

        Arguments that are no setting are given back. UnsupportedFeatureError names beam search, assisted generation,
        attention maps and the like, InputError settings that contradict one another.
        """
        config: Any = GenerationConfig() if given is None else copy.deepcopy(given)
        config.update(**of_model.to_dict(), defaults_only=True, allow_custom_entries=True)
        config.update(**_DEFAULTS, defaults_only=True)
        own_max_length = config.max_length is None and arguments.get("max_length") is None
        rest = config.update(**arguments)
        _refuse(config)
        eos = config.eos_token_id
        eos = () if eos is None else tuple(torch.as_tensor(eos).reshape(-1).tolist())
        padding = config.pad_token_id if config.pad_token_id is not None else next(iter(eos), None)
        return cls(config, eos, None if padding is None else int(padding), own_max_length), rest

    def inferred_mask(self, input_ids: Tensor) -> Tensor | None:
        """Return [B, T] where tokens are no padding, as transformers infers where a padding token is no EOS."""
        padding = self.config.pad_token_id
        if padding is None or padding in self.eos_token_ids or not bool((input_ids == padding).any()):
            return None
        return input_ids != padding

    def new_tokens(self, columns: int, longest: int, max_positions: int, own_limit: int | None = None) -> int:
        """Return how many tokens may be added to each row; `max_length` counts columns, as in transformers.

        `longest` are a row's tokens but for padding, those in a cache included; `own_limit`, columns in all by a
        criterion of the caller's, stands in for the settings'. InputError: there is no room, or not in the context.
        """
        config = self.config
        if own_limit is not None:
            added = max(own_limit - columns, 1)
        elif config.max_new_tokens is not None:
            added = config.max_new_tokens
        elif self.own_max_length:
            warnings.warn(f"neither max_new_tokens nor max_length is given: {_NEW_TOKENS} new tokens", stacklevel=4)
            added = max(min(_NEW_TOKENS, max_positions - longest), 1)
        else:
            added = config.max_length - columns
            if added < 1:
                raise InputError(
                    f"prompts of {columns} tokens fill max_length={config.max_length}; give max_new_tokens"
                )
        if (fed := longest + added - 1) > max_positions:
            raise InputError(
                f"prompt and new tokens, {fed} to feed, are longer than the model's context of {max_positions}"
            )
        return added


def _refuse(config: Any) -> None:
    mode = config.get_generation_mode()
    way = next((way for name, way in _OTHER_WAYS.items() if getattr(config, name, None)), None)
    if way is None and mode not in _MODES:
        way = mode.value.replace("_", " ")
    if way is not None:
        raise UnsupportedFeatureError(f"{way} is not supported; use greedy decoding or sampling")
    for name in _OUTPUTS:
        if getattr(config, name, None):
            raise UnsupportedFeatureError(f"{name} is not supported by quicksilver")
    for name in ("prefill_chunk_size", "num_return_sequences", "max_new_tokens"):
        if (count := getattr(config, name)) is not None and (not is_whole(count) or count < 1):
            raise InputError(f"{name} must be a whole number, at least 1, got {count!r}")
    if config.cache_implementation is not None:
        raise UnsupportedFeatureError(
            f"cache_implementation={config.cache_implementation!r} is not supported; the cache is ragged"
        )
    if config.num_return_sequences > 1 and not config.do_sample:
        raise InputError(
            f"num_return_sequences={config.num_return_sequences} asks for one continuation several times; with"
            " do_sample=True they differ"
        )
