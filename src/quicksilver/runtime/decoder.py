"""The layer loop: every token enters, some halt or fuse on the way, the rest run on. Read this file first.

What one layer does is in `block.py`; what halts or fuses is decided by `quicksilver.policies`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from quicksilver.cache import RaggedKVCache, SequenceCache
from quicksilver.core.ragged import RaggedLayout, TokenState
from quicksilver.core.trace import Trace
from quicksilver.errors import InputError
from quicksilver.families.spec import Adapter
from quicksilver.ops import AttentionBackend
from quicksilver.plan import Plan
from quicksilver.policies import kv
from quicksilver.runtime.block import Skipped, fill_layer, run_layer
from quicksilver.runtime.context import PassContext
from quicksilver.runtime.fusion import FusionStep
from quicksilver.runtime.halting import HaltingStep
from quicksilver.runtime.maps import OutputMaps
from quicksilver.runtime.precision import PrecisionStep
from quicksilver.runtime.shortcuts import ShortcutStep
from quicksilver.runtime.spans import LayerSpans
from quicksilver.runtime.status import Running, TokenStatus
from quicksilver.runtime.watch import WeightWatch

_FEW = 16  # tokens that are looked at one by one


class Decoder:
    """A frozen model under a plan. Holds no state between calls; the cache and the trace are the caller's.

    A copy of it, with its model's, is built anew from what this one was built from; caches of the one are not the
    other's.

    Args:
        adapter: the model.
        plan: what may be saved.
        special_ids: token ids that a plan with `protect_special` never halts or fuses.
        backend: attention implementation.

    Raises:
        PlanError: the plan does not fit the model.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        special_ids: Sequence[int] = (),
        backend: AttentionBackend = "sdpa",
    ) -> None:
        plan.check_model(adapter.spec.num_layers, len(adapter.layers[0].nested), adapter.spec.hidden_size)
        self.adapter = adapter
        self.spec = adapter.spec
        self.plan = plan
        self.backend: AttentionBackend = backend
        self._special_ids = tuple(special_ids)
        self._cache_shape = adapter.spec.cache_shape(plan.entry_bits)
        self._maps = OutputMaps(plan, adapter.spec)
        self._halting = HaltingStep(adapter, plan, special_ids)
        self._fusion = FusionStep(adapter, plan.fusion, special_ids)
        self._shortcuts = ShortcutStep(adapter, plan, special_ids)
        self._bind_weights()

    def __reduce__(self) -> tuple[type[Decoder], tuple[Any, ...]]:
        """Say how copies are made, since steps know modules by identity and kernels hold addresses."""
        return type(self), (self.adapter, self.plan, self._special_ids, self.backend)

    def head_entropy(self, hidden: Tensor) -> Tensor:
        """Return the entropy in bits of the model's head on states [M, d], [M]."""
        return self._halting.head_entropy(hidden)

    def new_cache(self, batch_size: int) -> RaggedKVCache:
        """Return an empty cache for a batch of `batch_size` sequences."""
        return RaggedKVCache([self.new_sequence() for _ in range(batch_size)])

    def new_sequence(self) -> SequenceCache:
        """Return an empty cache for one sequence; plans that keep entries in as many bits may continue it in turn."""
        return SequenceCache(self._cache_shape, self.adapter.identity)

    def new_trace(self, per_token: bool = False) -> Trace:
        """Return an empty trace for this model."""
        return Trace(self.spec.num_layers, per_token, self.plan.entry_bits)

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
        self._check_modules(decodes=len(token_ids) <= len(lengths) and any(starts))
        self.check_caches(caches, len(lengths))
        self.check_tokens(token_ids, lengths, starts)
        of_prompt = self._flags(prompt, len(lengths))
        chunk = RaggedLayout.build(starts, lengths, self.spec.device)
        if not any(starts):
            self._follow_weights()
        context = self._context(chunk, token_ids, self._fusion.takes_part(of_prompt), caches, trace)
        embedded = TokenState(self.adapter.embed(token_ids, chunk.positions), chunk)
        trace.begin_pass(starts, chunk)
        fed = [each for each in zip(caches, lengths, context.fuses, strict=True) if each[1]]
        for cache, _, _ in fed:
            cache.in_pass = True
        running, status = self._run_layers(Running(embedded, context.rotation), TokenStatus.all_running(chunk), context)
        for cache, length, fuses in fed:
            cache.advance(length, joinable=fuses and self._fusion.crosses_passes)
        trace.record_cache(*_held(caches))
        hidden = running.state.hidden if status.frozen is None else running.state.scatter_into(status.frozen)
        return self._maps.map_stopped(hidden, status.stops, trace)

    def _check_modules(self, decodes: bool) -> None:
        """Look whether modules are as they were; from token to token for hooks alone, since all of it takes time."""
        if (modules := self.adapter.modules) is not None:
            (modules.check_hooks if decodes else modules.check)()

    def _run_layers(self, running: Running, status: TokenStatus, context: PassContext) -> tuple[Running, TokenStatus]:
        """Run all layers."""
        layer_idx, modules = -1, self.adapter.modules
        spans = None if modules is not None and modules.is_observed else self._spans
        while (layer_idx := layer_idx + 1) < self.spec.num_layers:
            layer, skipped = self.adapter.layers[layer_idx], Skipped(status, kv.decide(self.plan.kv, layer_idx).fill)
            if len(running) == 0:  # nothing runs: the layer is skipped but for its fill
                fill_layer(layer, layer_idx, skipped, context)
            else:
                before = running
                if spans is None or (span := spans.span(layer_idx, running, status, context)) is None:
                    running = run_layer(layer, layer_idx, before, skipped, context)
                else:  # several layers at once, up to the next that must be asked about
                    running = spans.run(span, running, status, context)
                    layer_idx = span[-1]
                split = self._halting.decide(layer_idx, before.state, running.state, before.update, context)
                if self._halting.keeps_updates:
                    running = replace(running, update=running.state.hidden - before.state.hidden)
                if split is not None:
                    status, running = status.halt(layer_idx, running.state, split), running.select(split.keep)
                status = self._cap(layer_idx, running, status, context)
            if layer_idx in self._fusion.layers and (fused := self._fusion.apply(layer_idx, running, status, context)):
                running, status = fused
        return running, status

    def _bind_weights(self) -> None:
        """Make what is computed from the layers' weights."""
        watch = WeightWatch(self.adapter.layers) if self.adapter.kernels == "native" else None
        self._precision = PrecisionStep(self.adapter, self.plan, self._special_ids, self._halting.head_entropy)
        self._spans = self._native_spans()
        self._watch = watch

    def _follow_weights(self) -> None:
        """Make that anew where weights have changed: the kernels hold copies of them."""
        if self._watch is None or not self._watch.has_changed():
            return
        for layer in self.adapter.layers:
            for module in layer.nested:
                module.forget_norms()
        self._bind_weights()

    def _native_spans(self) -> LayerSpans | None:
        """Return what runs spans of layers by the native kernels, None where that cannot be."""
        if LayerSpans.obstacle(self.adapter, self.plan) is not None:
            return None
        asked = {*self._halting.layers, *self._fusion.layers, *self._precision.layers}
        return LayerSpans(self.adapter, self.plan, self._precision, self._shortcuts, asked)

    def _cap(self, layer_idx: int, running: Running, status: TokenStatus, context: PassContext) -> TokenStatus:
        """Let the tokens that go on decide how many bits they read from here, if this is the layer for it."""
        hidden, origins, count = running.state.hidden, running.state.layout.origin, context.chunk.num_tokens
        caps = self._precision.decide_tokens(layer_idx, hidden, origins, status.caps, count, context.trace)
        return status if caps is status.caps else replace(status, caps=caps)

    @staticmethod
    def _flags(prompt: bool | Sequence[bool], count: int) -> list[bool]:
        flags = [prompt] * count if isinstance(prompt, bool) else [bool(flag) for flag in prompt]
        if len(flags) != count:
            raise InputError(f"prompt has {len(flags)} flags for {count} sequences")
        return flags

    def _context(
        self,
        chunk: RaggedLayout,
        token_ids: Tensor,
        fuses: tuple[bool, ...],
        caches: tuple[SequenceCache, ...],
        trace: Trace,
    ) -> PassContext:
        rotate = self.adapter.rotation
        rotation = None if rotate is None else rotate(chunk.positions)
        protected = self._halting.protected(token_ids, chunk.positions)
        exempt = self._precision.exempt(token_ids, chunk.positions)
        unshortened = self._shortcuts.exempt(token_ids, chunk.positions)
        return PassContext(
            chunk=chunk,
            token_ids=token_ids,
            protected=protected,
            rotation=rotation,
            fuses=fuses,
            precision=self._precision,
            exempt=exempt,
            shortcuts=self._shortcuts,
            unshortened=unshortened,
            caches=caches,
            trace=trace,
            backend=self.backend,
            attention=self.plan.attention,
            screening=self.plan.screening,
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
            obstacle = cache.obstacle(self._cache_shape, self.adapter.identity)
            if obstacle is not None:
                raise InputError(f"{_sequence(index, count)}{obstacle}; start a new one")
        if count > 1 and len(set(map(id, caches))) < count:
            first = next(index for index, cache in enumerate(caches) if any(cache is other for other in caches[:index]))
            raise InputError(f"{_sequence(first, count)}its cache is another's too; give each a copy")

    def check_tokens(self, token_ids: Tensor, lengths: Sequence[int], seen: Sequence[int]) -> None:
        """Raise InputError where tokens [N] cannot follow what sequences have seen: wrong ids, too long a context."""
        if min(lengths, default=0) < 0 or sum(lengths) != len(token_ids):
            raise InputError(f"lengths {list(lengths)} do not divide {len(token_ids)} tokens")
        for index, (before, length) in enumerate(zip(seen, lengths, strict=True)):
            if before + length > self.spec.max_positions:
                raise InputError(
                    f"{_sequence(index, len(lengths))}a sequence of {before + length} tokens is longer than the model's"
                    f" context of {self.spec.max_positions}"
                )
        prefill = token_ids.shape[0] > len(lengths)
        if token_ids.device.type == "cpu" or prefill:  # a check costs a device synchronisation in decode
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
