"""The model users hold: transformers' `generate()` and call conventions over the ragged engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, StoppingCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from quicksilver.backends.base import LayerBackend
from quicksilver.cache import RaggedKVCache
from quicksilver.core.trace import Trace
from quicksilver.errors import InputError, UnsupportedFeatureError
from quicksilver.families.registry import adapt
from quicksilver.families.spec import Adapter
from quicksilver.ops import AttentionBackend
from quicksilver.ops.native import KernelChoice
from quicksilver.plan import Plan
from quicksilver.plan.presets import resolve_plan
from quicksilver.runtime.facts import ModelFacts
from quicksilver.runtime.generate import CACHE_FIELD, Request, generate, told_the_end
from quicksilver.runtime.loop import Decoder
from quicksilver.runtime.settings import Settings
from quicksilver.runtime.stats import RunStats
from quicksilver.runtime.unpadded import (
    Columns,
    UnpaddedBatch,
    check_positions,
    kept_columns,
    padded_logits,
    real_tokens,
    shifted_loss,
    split_mask,
)


class QuickSilverForCausalLM(ModelFacts, GenerationMixin):
    """A frozen transformers model run under a plan, with transformers' own interface.

    The wrapped model's weights are used in place. Gradients are never computed.

    Args:
        model: a loaded transformers causal language model, kept as `.model`.
        adapter: how its family's weights are read.
        plan: what may be saved.
        special_ids: token ids that a plan with `protect_special` never halts or fuses.
        attention: which of PyTorch's attention runs where PyTorch runs layers, "sdpa" or "eager".
        kernels: which kernels were asked for to read any-precision weights; the adapter says which do.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        plan: Plan,
        special_ids: Sequence[int] = (),
        attention: AttentionBackend = "sdpa",
        kernels: KernelChoice = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.generation_config: GenerationConfig = model.generation_config
        self.adapter = adapter  # the wrapped model as the engine sees it
        self.special_ids = tuple(special_ids)  # protected where the plan says so
        self.kernels: KernelChoice = kernels  # as asked for; `adapter.kernels` says which do
        self._attention: AttentionBackend = attention
        self.decoder = Decoder(adapter, plan, self.special_ids, attention)  # for callers that feed ragged rows
        self._trace = self.decoder.new_trace()

    @property
    def plan(self) -> Plan:
        """The plan in force; assign another, a preset's name or a plan file to change it."""
        return self.decoder.plan

    @plan.setter
    def plan(self, plan: Plan | str | os.PathLike[str]) -> None:
        self.decoder = Decoder(self.adapter, resolve_plan(plan), self.special_ids, self._attention)

    @property
    def backend(self) -> LayerBackend:
        """Who runs the layers: its `name`, "native" or "pytorch", and the `reason` why not a faster one."""
        return self.decoder.backend

    @property
    def stats(self) -> RunStats:
        """What the last call of the model, or the last `generate`, ran."""
        return RunStats.from_trace(self.adapter.spec, self._trace, self.backend)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.adapter.spec.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' element type."""
        return self.adapter.spec.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> QuickSilverForCausalLM:
        """Follow the wrapped model where `.to(...)`, `.half()` and the like take it."""
        super()._apply(fn, recurse)
        self._adapt()
        return self

    def _adapt(self) -> None:
        self.adapter = adapt(self.model, self.kernels)
        self.plan = self.plan

    def _follow_modules(self) -> None:
        """Read the model anew where modules of it were replaced: adapters put in, or merged; refuse what cannot run."""
        modules = self.adapter.modules
        if modules is not None and modules.is_replaced:
            self._adapt()
        elif modules is not None:
            modules.check_hung()

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RaggedKVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: Columns = 0,
        return_dict: bool | None = None,
        trace: Trace | None = None,
        prompt: bool | None = None,
        cache: RaggedKVCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model on a grid of tokens.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, P + T] or [B, T], 0 where a token is padding; padding is not computed, and
                positions count real tokens from 0. P is what the cache has seen. Cached tokens at a row's end that it
                no longer shows are taken back.
            past_key_values: a cache this model returned, extended in place.
            labels: [B, T] targets, -100 where none; the loss is the mean over targets, shifted by one.
            use_cache: return a cache (default: the configuration's).
            logits_to_keep: last columns to compute logits for (0: all), or which, as `padded_logits` takes them.
            return_dict: False for a plain tuple.
            trace: counts to add to (default: a new one, which `stats` then reads).
            prompt: the tokens belong to a prompt, so that a plan may fuse them (default: where only the last of
                several columns' logits are asked for).
            cache: another name of `past_key_values`.
            **others: transformers' other arguments; anything but None or False is refused, but for `position_ids`
                ([B, T] or [1, T]) that are what mask and cache imply. Were they named here, `generate` would make some.

        Returns:
            Logits [B, K, vocab] (zeros at padding), the loss where labels are given, and the cache.

        Raises:
            InputError: token ids out of range, no real token, a context longer than the model's, two caches, or a mask
                that hides other cached tokens than the last.
            UnsupportedFeatureError: an argument this runtime does not implement.
        """
        self._follow_modules()
        position_ids = others.pop("position_ids", None)
        input_ids = self._check_call(input_ids, others, prompt, labels)
        cache = self._check_cache(_only(past_key_values, cache), input_ids.shape[0])
        decoder, generating = self.decoder, trace is not None
        trace = self._trace = decoder.new_trace() if trace is None else trace
        decoder.check_caches(cache.sequences, len(input_ids))
        input_ids = input_ids.to(self.device)
        wanted = None if labels is not None else kept_columns(logits_to_keep, input_ids.shape[1], self.device)
        unpadded = self._continue(cache, input_ids, attention_mask, position_ids, labels)
        if prompt is None:
            prompt = (
                labels is None and unpadded.shape[1] > 1 and isinstance(logits_to_keep, int) and logits_to_keep == 1
            )
        if generating and not any(unpadded.lengths):  # a chunk of a prefill that is all padding
            hidden = unpadded.token_ids.new_zeros((0, decoder.spec.hidden_size), dtype=self.dtype)
        else:
            hidden = decoder.run(unpadded.token_ids, unpadded.lengths, cache, trace, prompt)
        cache.fed.append(input_ids.clone(), unpadded.real)
        logits = padded_logits(hidden, unpadded, wanted, lambda rows: decoder.logits(rows, trace))
        loss = None if labels is None else shifted_loss(logits, labels, unpadded)
        returned = cache if (self.config.use_cache if use_cache is None else use_cache) else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_FIELD: returned})  # type: ignore[arg-type]
        return output.to_tuple() if return_dict is False else output

    def _continue(
        self,
        cache: RaggedKVCache,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
    ) -> UnpaddedBatch:
        """Return the tokens that continue a cache; it loses what the mask hides, but for no call that is refused."""
        seen, real = split_mask(attention_mask, tuple(input_ids.shape), cache.fed.count)
        unpadded = real_tokens(input_ids, None if real is None else real.to(self.device))
        kept = None if seen is None else cache.fed.kept_by(seen.to(self.device))
        if position_ids is not None:
            check_positions(position_ids, unpadded, kept or cache.seq_lengths)
        if labels is not None and tuple(labels.shape) != unpadded.shape:
            raise InputError(f"labels of shape {tuple(labels.shape)} do not fit input_ids {unpadded.shape}")
        if kept is not None:
            self.decoder.check_tokens(unpadded.token_ids, unpadded.lengths, kept)
            cache.truncate(kept)
        return unpadded

    @staticmethod
    def _check_call(
        input_ids: Tensor | None, unsupported: Mapping[str, Any], prompt: bool | None, labels: Tensor | None
    ) -> Tensor:
        """Return the tokens of a call that can be done; raise where it cannot."""
        _refuse(unsupported)
        if (
            not isinstance(input_ids, Tensor)
            or input_ids.dim() != 2
            or input_ids.dtype not in (torch.int64, torch.int32)
        ):
            raise InputError("input_ids must be a [batch, tokens] tensor of int64 or int32")
        if prompt and labels is not None:
            raise InputError("labels ask for what every token predicts, so the tokens cannot be a prompt")
        return input_ids

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: Any = None,
        tokenizer: Any = None,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, by greedy decoding or sampling; `runtime/generate.py` says where it differs.

        Args:
            inputs: [B, T] the prompts, padded on the left; BOS where none are given. Or `input_ids`.
            generation_config: what is asked for where no argument says it; where neither does, the model's own.
            logits_processor: more processors, after those that settings ask for; of one kind, they stand in for them.
            stopping_criteria: more criteria.
            prefix_allowed_tokens_fn: given a row's index and its tokens, returns what may come next.
            synced_gpus: not supported.
            assistant_model: not supported.
            streamer: given the prompts, then each step's tokens; told the end whatever happens.
            negative_prompt_ids: of `guidance_scale`.
            negative_prompt_attention_mask: of `guidance_scale`.
            custom_generate: not supported.
            tokenizer: which stop strings and token healing need.
            seed: makes a sampled token a function of the seed, the sequence, its position and the scores alone, so that
                neighbours and restarts do not change it: one for all, or one for each sequence that is returned. None
                draws from PyTorch's generator, as transformers does.
            **kwargs: settings by name, and `input_ids`, `attention_mask` ([B, T], or [B, P + T] with a cache),
                `past_key_values` or `cache` (of the prompts' beginning, extended in place), `position_ids`.

        Returns:
            [B * num_return_sequences, T + new] tokens, or a `GenerateDecoderOnlyOutput` where it is asked for.

        Raises:
            UnsupportedFeatureError: beam search, assisted generation, or a cache implementation by name.
            InputError: prompts that are empty or padded on the right, more new tokens than the model's context holds,
                two caches, or a cache that is not the beginning of the prompt.
        """
        with told_the_end(streamer):
            if assistant_model is not None:
                raise UnsupportedFeatureError("assisted generation (assistant_model) is not supported")
            given = {name: kwargs.pop(name, None) for name in ("input_ids", "attention_mask", "position_ids")}
            cache = _only(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
            settings, rest = Settings.resolve(generation_config, self.generation_config, kwargs)
            _refuse({"synced_gpus": synced_gpus, "custom_generate": custom_generate, **rest})
            ids = self._prompts(inputs, given.pop("input_ids"), settings)
            if settings.config.token_healing:
                ids, given["attention_mask"] = self._heal(ids, given["attention_mask"], tokenizer), None
            cache = None if cache is None else self._check_cache(cache, len(ids))
            self._follow_modules()
            trace = self.decoder.new_trace()
            request = Request(
                input_ids=ids,
                cache=cache,
                logits_processor=logits_processor or (),
                stopping_criteria=stopping_criteria or (),
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                guidance=(negative_prompt_ids, negative_prompt_attention_mask),
                streamer=streamer,
                tokenizer=tokenizer,
                seed=seed,
                **given,
            )
            output = generate(self, settings, request, trace)
            self._trace = trace  # a processor may have called the model in between
            return output

    def _heal(self, input_ids: Tensor, attention_mask: Tensor | None, tokenizer: Any) -> Tensor:
        """Return prompts whose last tokens fit what may follow, by transformers' own `heal_tokens`."""
        if attention_mask is not None and not bool((attention_mask != 0).all()):
            raise UnsupportedFeatureError("token_healing of padded prompts is not supported; pass one at a time")
        return self.heal_tokens(input_ids, tokenizer)  # type: ignore[arg-type]  # any whole numbers do

    @staticmethod
    def _prompts(inputs: Tensor | None, input_ids: Tensor | None, settings: Settings) -> Tensor:
        if inputs is not None and input_ids is not None:
            raise InputError("inputs and input_ids are two names of one argument; give one")
        ids, bos = inputs if input_ids is None else input_ids, settings.config.bos_token_id
        if ids is None and bos is not None:
            ids = torch.tensor([[int(bos)]])
        if ids is None or ids.numel() == 0:
            raise InputError("the prompt is empty; pass at least one sequence of at least one token")
        if ids.dim() != 2 or ids.is_floating_point():
            raise InputError(f"prompts must be [batch, tokens] token ids, got {list(ids.shape)} {ids.dtype}")
        return ids

    @property
    def is_watched(self) -> bool:
        """Whether somebody counts on every token's call: by hooks, or by a `forward` of a class of their own."""
        hooks = (self._forward_hooks, self._forward_pre_hooks)
        return any(hooks) or "forward" in vars(self) or type(self).forward is not QuickSilverForCausalLM.forward

    def _check_cache(self, cache: object, batch_size: int) -> RaggedKVCache:
        if cache is None:
            return self.decoder.new_cache(batch_size)
        if not isinstance(cache, RaggedKVCache):
            raise UnsupportedFeatureError(
                f"past_key_values must be a cache this model returned, not {type(cache).__name__}"
            )
        return cache


def _refuse(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise UnsupportedFeatureError(f"the argument {name!r} is not supported by quicksilver")


def _only(past_key_values: Any, cache: Any) -> Any:
    """Return the cache, by whichever of its names it was given; None where it was not."""
    if past_key_values is not None and cache is not None:
        raise InputError("past_key_values and cache are two names of one argument; give one")
    return past_key_values if cache is None else cache
