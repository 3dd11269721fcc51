"""The layer loop: every token enters, some halt or fuse on the way, the rest run on. Read this file first.

What a layer is, is in `backends`; what halts or fuses is decided by `rules`, and applied by the steps between layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from quicksilver.backends.base import LayerBackend
from quicksilver.backends.native import choose
from quicksilver.backends.resolved import resolve
from quicksilver.backends.state import PassContext, Protected, State, Step
from quicksilver.cache import RaggedKVCache, SequenceCache
from quicksilver.core.ragged import RaggedLayout
from quicksilver.core.trace import Trace
from quicksilver.errors import InputError
from quicksilver.families.spec import Adapter
from quicksilver.ops import AttentionBackend
from quicksilver.plan import Plan
from quicksilver.rules.registry import guarded
from quicksilver.runtime.protection import Protection
from quicksilver.runtime.steps.bits import BitsStep
from quicksilver.runtime.steps.fusion import FusionStep
from quicksilver.runtime.steps.halting import HaltingStep, map_stopped
from quicksilver.runtime.versions import WeightVersions

_FEW = 16  # tokens that are looked at one by one


class Decoder:
    """A frozen model under a plan. Holds no state between calls; the cache and the trace are the caller's.

    A copy of it, with its model's, is built anew from what this one was built from; caches of the one are not the
    other's. A plan with `protect_special` never halts or fuses `special_ids`; `attention` is which of PyTorch's runs
    where PyTorch runs layers.

    Raises:
        PlanError: the plan does not fit the model.
    """

    backend: LayerBackend  # who runs the layers

    def __init__(
        self, adapter: Adapter, plan: Plan, special_ids: Sequence[int] = (), attention: AttentionBackend = "sdpa"
    ) -> None:
        self.adapter, self.spec, self.plan = adapter, adapter.spec, plan
        self._special_ids = tuple(special_ids)
        self._attention: AttentionBackend = attention
        self._cache_shape = adapter.spec.cache_shape(plan.kv.bits)
        self._fusion = FusionStep(adapter, plan.fusion, special_ids)
        device = adapter.spec.device
        rule = None if plan.halting is None else plan.halting.rule
        self._protects_halting = None if rule is None else Protection(plan.halting, special_ids, device)
        self._protects_bits = Protection(plan.precision, special_ids, device)
        shortcuts = plan.halting.for_shortcuts if plan.halting is not None and plan.shortcuts else None
        self._protects_shortcuts = Protection(shortcuts, special_ids, device)
        self._bind_weights()

    def __reduce__(self) -> tuple[type[Decoder], tuple[Any, ...]]:
        """Say how copies are made, since backends know modules by identity and kernels hold addresses."""
        return type(self), (self.adapter, self.plan, self._special_ids, self._attention)

    def new_cache(self, batch_size: int) -> RaggedKVCache:
        """Return an empty cache for a batch of `batch_size` sequences."""
        return RaggedKVCache([self.new_sequence() for _ in range(batch_size)])

    def new_sequence(self) -> SequenceCache:
        """Return an empty cache for one sequence; plans that keep entries in as many bits may continue it in turn."""
        return SequenceCache(self._cache_shape, self.adapter.identity)

    def new_trace(self, per_token: bool = False) -> Trace:
        """Return an empty trace for this model."""
        return Trace(self.spec.num_layers, per_token, self.plan.kv.bits)

    @torch.no_grad()
    def run(
        self,
        token_ids: Tensor,
        lengths: Sequence[int],
        caches: RaggedKVCache | Sequence[SequenceCache],
        trace: Trace,
        prompt: bool | Sequence[bool] = False,
    ) -> Tensor:
        """Feed sequences' next tokens through the layers: of any sequences, here a whole prompt and there one token.

        All that is given is checked before anything is written. Where a pass fails on the way, the sequences that it
        fed cannot go on.

        Args:
            token_ids: [N] new tokens of all sequences, end to end.
            lengths: new tokens of each sequence, 0 for none; they continue what its cache has seen.
            caches: of the sequences, from wherever they come; extended in place.
            trace: added to.
            prompt: the tokens belong to a prompt: nobody asks what any but the last predicts. For all sequences, or
                for each. A plan may fuse such tokens only.

        Returns:
            [N, d] the state of each token after the last layer it ran, before the final norm; where the plan maps
            the states of tokens that stop early, the mapped one.

        Raises:
            InputError: a token id out of range, a sequence longer than the model allows, a cache that cannot be
                continued or is given twice, or lengths or flags of another number.
            UnsupportedModelError: something was put on the model's modules, or in their place, that would not run.
        """
        caches = tuple(caches.sequences if isinstance(caches, RaggedKVCache) else caches)
        starts = [cache.length for cache in caches]
        modules, decodes = self.adapter.modules, any(starts) and token_ids.shape[0] <= len(lengths)
        if modules is not None and decodes:
            modules.check_hooks()  # not more between one token and the next, since all of it takes time
        elif modules is not None:
            modules.check()
        self.check_caches(caches, len(lengths))
        self.check_tokens(token_ids, lengths, starts)
        fuses = self._fusion.takes_part(_flags(prompt, len(lengths)))
        chunk = RaggedLayout.build(starts, lengths, self.spec.device)
        if not any(starts):
            self._rebind_if_changed()
        rotations = tuple(rotate(chunk.positions) for rotate in self.adapter.rotations)
        protected = self._protected(token_ids, chunk.positions)
        context = PassContext(token_ids, rotations, protected, fuses, caches, trace)
        state = State(chunk, self.adapter.embed(token_ids, chunk.positions), chunk, rotations, chunk)
        trace.begin_pass(starts, chunk)
        fed = [(cache, n, fusing) for cache, n, fusing in zip(caches, lengths, fuses, strict=True) if n]
        for cache, _, _ in fed:
            cache.in_pass = True
        for span in self.backend.spans(state, context):
            self.backend.run(span, state, context)
            for step in self._steps_after[span[-1]]:
                step(span[-1], state, context)
        for cache, length, fusing in fed:
            cache.advance(length, joinable=fusing and self._fusion.crosses_passes)
        trace.record_cache(*_held(caches))
        hidden, maps = state.final(), self._plan.output_maps
        return map_stopped(maps, hidden, state.stops, trace) if maps and state.stops else hidden

    def _bind_weights(self) -> None:
        """Make what is computed from plan and weights: who runs the layers, and the steps between them that are on."""
        adapter, plan = self.adapter, self.plan
        self._plan = resolve(plan, adapter)
        steps: list[HaltingStep | BitsStep | FusionStep] = []
        if plan.halting is not None and plan.halting.rule is not None:
            steps.append(HaltingStep(adapter, plan.halting, self._plan.gates, plan.fusion is not None))
        if (rule := self._plan.bits) is not None and (
            after := guarded(rule.after_layer, self.spec.num_layers)
        ) is not None:
            steps.append(BitsStep(adapter, rule, after))
        if self._fusion.layers:
            steps.append(self._fusion)
        self._steps_after: list[list[Step]] = [
            [step for step in steps if layer_idx in step.layers] for layer_idx in range(self.spec.num_layers)
        ]
        asked = [layer_idx for layer_idx, after in enumerate(self._steps_after) if after]
        self.backend = choose(adapter, self._plan, asked, self._attention)
        self._versions = WeightVersions(adapter.layers) if self.backend.name == "native" else None

    def _rebind_if_changed(self) -> None:
        """Make that anew where weights have changed: the kernels hold copies of them."""
        if self._versions is None or not self._versions.have_changed():
            return
        for layer in self.adapter.layers:
            for module in layer.quantized:
                module.forget_norms()
        self._bind_weights()

    def _protected(self, token_ids: Tensor, positions: Tensor) -> Protected:
        halting = self._protects_halting
        return Protected(
            None if halting is None else halting.covers(token_ids, positions),
            self._protects_bits.found(token_ids, positions),
            self._protects_shortcuts.found(token_ids, positions, waits=True),
        )

    @torch.no_grad()
    def logits(self, hidden: Tensor, trace: Trace) -> Tensor:
        """Apply the final norm and the head to states [M, d]; return [M, vocab]."""
        trace.head_rows += hidden.shape[0]
        return self.adapter.logits(hidden)

    def check_caches(self, caches: Sequence[SequenceCache], count: int) -> None:
        """Raise InputError where caches cannot be continued by `count` sequences."""
        if count != len(caches):
            raise InputError(f"{count} sequences were given to a cache of {len(caches)}")
        for index, cache in enumerate(caches):
            reason = cache.unsupported_reason(self._cache_shape, self.adapter.identity)
            if reason is not None:
                raise InputError(f"{_sequence(index, count)}{reason}; start a new one")
        if count > 1 and len(set(map(id, caches))) < count:
            first = next(index for index, cache in enumerate(caches) if any(cache is other for other in caches[:index]))
            raise InputError(f"{_sequence(first, count)}its cache is another's too; give each a copy")

    def check_tokens(self, token_ids: Tensor, lengths: Sequence[int], seen: Sequence[int]) -> None:
        """Raise InputError where tokens [N] cannot follow what sequences have seen: wrong ids, too long a context."""
        if min(lengths, default=0) < 0 or sum(lengths) != token_ids.shape[0]:
            raise InputError(f"lengths {list(lengths)} do not divide {token_ids.shape[0]} tokens")
        for index, (before, length) in enumerate(zip(seen, lengths, strict=True)):
            if before + length > self.spec.max_positions:
                raise InputError(
                    f"{_sequence(index, len(lengths))}a sequence of {before + length} tokens is longer than the model's"
                    f" context of {self.spec.max_positions}"
                )
        prefill = token_ids.shape[0] > len(lengths)
        if token_ids.is_cpu or prefill:  # a check costs a device synchronisation in decode
            check_token_ids(token_ids, self.spec.vocab_size, lengths)


def check_token_ids(token_ids: Tensor, vocab_size: int, lengths: Sequence[int] = ()) -> None:
    """Raise InputError where an id is not in [0, vocab_size), naming of which sequence where several have `lengths`."""
    if token_ids.numel() == 0:
        raise InputError("no tokens were given")
    few = token_ids.tolist() if token_ids.numel() <= _FEW else torch.stack(token_ids.aminmax()).tolist()
    low, high = min(few), max(few)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        row = int((token_ids == wrong).nonzero()[0])
        index = next((index for index, end in enumerate(accumulate(lengths)) if row < end), 0)
        raise InputError(f"{_sequence(index, len(lengths))}token id {wrong} is outside the vocabulary of {vocab_size}")


def _sequence(index: int, count: int) -> str:
    """Return how an error names one of several sequences."""
    return f"sequence {index}: " if count > 1 else ""


def _held(caches: Sequence[SequenceCache]) -> tuple[int, int, int]:
    """Return bytes allocated, bytes of what is held, and entries of all sequences."""
    allocated = used = entries = 0
    for cache in caches:
        allocated, used, entries = allocated + cache.nbytes, used + cache.used_nbytes, entries + cache.num_entries
    return allocated, used, entries


def _flags(prompt: bool | Sequence[bool], count: int) -> list[bool]:
    flags = [prompt] * count if isinstance(prompt, bool) else [bool(flag) for flag in prompt]
    if len(flags) != count:
        raise InputError(f"prompt has {len(flags)} flags for {count} sequences")
    return flags
