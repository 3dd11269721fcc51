"""The layer loop: every token enters, some halt or fuse on the way, the rest run on. Read this file first.

What one layer does is in `block.py`; what halts or fuses is decided by `quicksilver.policies`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quicksilver.cache import RaggedKVCache
from quicksilver.core.decisions import Fill
from quicksilver.core.ragged import RaggedLayout, TokenState
from quicksilver.core.trace import Trace
from quicksilver.errors import InputError
from quicksilver.families.spec import Adapter
from quicksilver.ops import AttentionBackend
from quicksilver.plan import Plan
from quicksilver.policies import kv
from quicksilver.runtime.block import Skipped, fill_layer, run_layer
from quicksilver.runtime.context import PassContext
from quicksilver.runtime.fusion import FusionStep, Rerun
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
        self._owner = (plan.hash, id(adapter))
        self._maps = OutputMaps(plan, adapter.spec)
        self._halting = HaltingStep(adapter, plan, special_ids)
        self._fusion = FusionStep(adapter, plan.fusion, special_ids)
        self._shortcuts = ShortcutStep(adapter, plan, special_ids)
        self._bind_weights()

    def __reduce__(self) -> tuple[type[Decoder], tuple[Any, ...]]:
        """Say how copies are made, since steps know modules by identity and kernels hold addresses."""
        return type(self), (self.adapter, self.plan, self._special_ids, self.backend)

    @property
    def fusion_layers(self) -> tuple[int, ...]:
        """Indices of the layers after which tokens may fuse, ascending."""
        return self._fusion.layers

    def head_entropy(self, hidden: Tensor) -> Tensor:
        """Return the entropy in bits of the model's head on states [M, d], [M]."""
        return self._halting.head_entropy(hidden)

    def new_cache(self, batch_size: int) -> RaggedKVCache:
        """Return an empty cache for `batch_size` sequences under this plan."""
        shape = self.spec.cache_shape(self.plan.entry_bits)
        return RaggedKVCache(shape, batch_size, self._owner, self._fusion.layers)

    def new_trace(self, per_token: bool = False) -> Trace:
        """Return an empty trace for this model."""
        return Trace(self.spec.num_layers, per_token, self.plan.entry_bits)

    @torch.no_grad()
    def run(
        self,
        token_ids: Tensor,
        lengths: Sequence[int],
        cache: RaggedKVCache,
        trace: Trace,
        prompt: bool | Sequence[bool] = False,
    ) -> Tensor:
        """Feed each sequence's next tokens through the layers.

        Args:
            token_ids: [N] new tokens of all sequences, end to end.
            lengths: new tokens of each sequence; they continue what the cache has seen.
            cache: extended in place.
            trace: added to.
            prompt: the tokens belong to a prompt: nobody asks what any but the last predicts. For all sequences, or
                for each. A plan may fuse such tokens only.

        Returns:
            [N, d] the state of each token after the last layer it ran, before the final norm; where the plan maps
            the states of tokens that stop early, the mapped one.

        Raises:
            InputError: a token id out of range, a sequence longer than the model allows, or flags of another number.
            UnsupportedModelError: something was put on the model's modules, or in their place, that would not run.
        """
        self._check_modules(decodes=len(token_ids) <= len(lengths) and any(cache.seq_lengths))
        self.check_cache(cache, len(lengths))
        self.check_tokens(token_ids, lengths, cache.seq_lengths)
        of_prompt = self._flags(prompt, len(lengths))
        chunk = RaggedLayout.build(cache.seq_lengths, lengths, self.spec.device)
        if not any(cache.seq_lengths):
            self._follow_weights()
        trace.begin_pass(cache.seq_lengths, chunk)
        cache.in_pass = True
        context = self._context(chunk, token_ids, self._fusion.takes_part(of_prompt), cache, trace)
        embedded = TokenState(self.adapter.embed(token_ids, chunk.positions), chunk)
        running, status = self._run_layers(
            0, Running(embedded, context.rotations), TokenStatus.all_running(chunk), context
        )
        cache.advance(chunk, context.fuses)
        trace.record_cache(cache.nbytes, cache.used_nbytes, cache.num_entries)
        hidden = running.state.hidden if status.frozen is None else running.state.scatter_into(status.frozen)
        return self._maps.map_stopped(hidden, status.stops, trace)

    def _check_modules(self, decodes: bool) -> None:
        """Look whether modules are as they were; from token to token for hooks alone, since all of it takes time."""
        if (modules := self.adapter.modules) is not None:
            (modules.check_hooks if decodes else modules.check)()

    def _run_layers(
        self, first: int, running: Running, status: TokenStatus, context: PassContext
    ) -> tuple[Running, TokenStatus]:
        """Run the layers from `first` on."""
        layer_idx, modules = first - 1, self.adapter.modules
        spans = None if modules is not None and modules.is_observed else self._spans
        while (layer_idx := layer_idx + 1) < self.spec.num_layers:
            layer, skipped = self.adapter.layers[layer_idx], Skipped(status, kv.decide(self.plan.kv, layer_idx).fill)
            if len(running) == 0:  # nothing runs: the layer is skipped but for its fill, by whoever would have run it
                if (
                    spans is not None
                    and skipped.fill is Fill.PROJECT
                    and spans.span(layer_idx, running, status, context)
                ):
                    running = spans.run(range(layer_idx, layer_idx + 1), running, status, context)
                else:
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
                if fused.rerun is not None:
                    self._run_again(layer_idx + 1, fused.rerun, context)
                running, status = fused.running, fused.status
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

    def _run_again(self, first: int, rerun: Rerun, outer: PassContext) -> None:
        """Run the layers from `first` on for tokens of earlier passes, ahead of a pass's own."""
        chunk = rerun.state.layout
        fuses = tuple(fuses and length > 0 for fuses, length in zip(outer.fuses, chunk.lengths, strict=True))
        context = self._context(chunk, rerun.token_ids, fuses, outer.cache, outer.trace)
        with outer.trace.rerun(chunk.num_tokens, self.spec.device):
            self._run_layers(
                first,
                Running(rerun.state, context.rotations, rerun.update),
                TokenStatus.all_running(
                    chunk, None if rerun.state.mass is None else rerun.state.mass.clone(), rerun.caps
                ),
                context,
            )

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
        cache: RaggedKVCache,
        trace: Trace,
    ) -> PassContext:
        rotations = tuple(rotate(chunk.positions) for rotate in self.adapter.rotations)
        protected = self._halting.protected(token_ids, chunk.positions)
        exempt = self._precision.exempt(token_ids, chunk.positions)
        unshortened = self._shortcuts.exempt(token_ids, chunk.positions)
        return PassContext(
            chunk=chunk,
            token_ids=token_ids,
            protected=protected,
            rotations=rotations,
            fuses=fuses,
            precision=self._precision,
            exempt=exempt,
            shortcuts=self._shortcuts,
            unshortened=unshortened,
            cache=cache,
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

    def check_cache(self, cache: RaggedKVCache, batch_size: int) -> None:
        """Raise InputError where a cache cannot be continued under this plan by so many sequences."""
        if batch_size != cache.batch_size:
            raise InputError(f"{batch_size} sequences were given to a cache of {cache.batch_size}")
        if cache.owner != self._owner:
            raise InputError(
                f"the cache was written by another model or under another plan than {self.plan.name!r}; start a new one"
            )
        if cache.in_pass:
            raise InputError("an earlier pass over this cache failed and left it incomplete; start a new one")

    def check_tokens(self, token_ids: Tensor, lengths: Sequence[int], seen: Sequence[int]) -> None:
        """Raise InputError where tokens [N] cannot follow what sequences have seen: wrong ids, too long a context."""
        for before, length in zip(seen, lengths, strict=True):
            if before + length > self.spec.max_positions:
                raise InputError(
                    f"a sequence of {before + length} tokens is longer than the model's context"
                    f" of {self.spec.max_positions}"
                )
        prefill = token_ids.shape[0] > len(lengths)
        if token_ids.device.type == "cpu" or prefill:  # a check costs a device synchronisation in decode
            check_token_ids(token_ids, self.spec.vocab_size)


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Raise InputError where an id is not in [0, vocab_size)."""
    if token_ids.numel() == 0:
        raise InputError("no tokens were given")
    few = token_ids.tolist() if token_ids.numel() <= _FEW else torch.stack(token_ids.aminmax()).tolist()
    low, high = min(few), max(few)
    if low < 0 or high >= vocab_size:
        raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
