"""The layer loop: every token enters, some halt on the way, the rest run to the end. Read this file first.

What one layer does is in `block.py`; what halts is decided by `quicksilver.policies`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quicksilver.cache import RaggedKVCache
from quicksilver.core.plan import Plan
from quicksilver.core.ragged import RaggedLayout, TokenState
from quicksilver.core.rules import ShareFill
from quicksilver.core.trace import Trace
from quicksilver.errors import InputError
from quicksilver.models.spec import Adapter
from quicksilver.ops import AttentionBackend
from quicksilver.policies import kv
from quicksilver.runtime.block import PassContext, Skipped, fill_layer, run_layer
from quicksilver.runtime.halting import HaltedTokens, HaltingStep


class Decoder:
    """A frozen model under a plan. Holds no state between calls; the cache and the trace are the caller's.

    Args:
        adapter: the model.
        plan: what may be saved.
        special_ids: token ids that a plan with `protect_special` never halts.
        backend: attention implementation.

    Raises:
        PlanError: the plan does not fit the model's depth.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        special_ids: Sequence[int] = (),
        backend: AttentionBackend = "sdpa",
    ) -> None:
        plan.check_depth(adapter.spec.num_layers)
        self.adapter = adapter
        self.spec = adapter.spec
        self.plan = plan
        self.backend: AttentionBackend = backend
        self._owner = (plan.hash, id(adapter))
        self._halting = HaltingStep(adapter, plan.halting, special_ids)

    def new_cache(self, batch_size: int) -> RaggedKVCache:
        """Return an empty cache for `batch_size` sequences under this plan."""
        shared = isinstance(self.plan.kv, ShareFill) and not self.plan.is_dense
        return RaggedKVCache(self.spec.cache_shape, batch_size, shared, owner=self._owner)

    def new_trace(self, per_token: bool = False) -> Trace:
        """Return an empty trace for this model."""
        return Trace(self.spec.num_layers, per_token)

    @torch.no_grad()
    def run(self, token_ids: Tensor, lengths: Sequence[int], cache: RaggedKVCache, trace: Trace) -> Tensor:
        """Feed each sequence's next tokens through the layers.

        Args:
            token_ids: [N] new tokens of all sequences, end to end.
            lengths: new tokens of each sequence; they continue what the cache has seen.
            cache: extended in place.
            trace: added to.

        Returns:
            [N, d] the state of each token after the last layer it ran, before the final norm.

        Raises:
            InputError: a token id out of range, or a sequence longer than the model allows.
        """
        self._check_inputs(token_ids, lengths, cache)
        chunk = RaggedLayout.build(cache.seq_lengths, lengths, self.spec.device)
        trace.begin_pass(cache.seq_lengths, chunk)
        cache.in_pass = True
        rotate = self.adapter.rotation
        context = PassContext(chunk, None if rotate is None else rotate(chunk.positions), cache, trace, self.backend)
        state = TokenState(self.adapter.embed(token_ids, chunk.positions), chunk)
        halted = HaltedTokens.none(chunk)
        tokens = self._halting.tokens(token_ids, chunk)
        rotation, previous_update = context.rotation, None
        for layer_idx, layer in enumerate(self.adapter.layers):
            skipped = Skipped(halted, kv.decide(self.plan.kv, layer_idx).fill)
            if state.hidden.shape[0] == 0:  # nothing runs: the layer is skipped but for its fill
                fill_layer(layer, layer_idx, skipped, context)
                continue
            before = state
            state = run_layer(layer, layer_idx, state, rotation, skipped, context)
            rows = self._halting.decide(layer_idx, before, state, previous_update, tokens, trace)
            if self._halting.keeps_updates:
                previous_update = state.hidden - before.hidden
            if rows is not None:
                halted = halted.add(state, rows)
                state = state.select(rows.keep)
                rotation = None if rotation is None else rotation.select(rows.keep)
                previous_update = None if previous_update is None else previous_update.index_select(0, rows.keep)
        cache.advance(chunk)
        trace.record_cache(cache.nbytes, cache.used_nbytes, cache.num_entries)
        return state.hidden if halted.grid is None else state.scatter_into(halted.grid)

    @torch.no_grad()
    def logits(self, hidden: Tensor, trace: Trace) -> Tensor:
        """Apply the final norm and the head to states [M, d]; return [M, vocab]."""
        trace.head_rows += hidden.shape[0]
        return self.adapter.head(self.adapter.final_norm(hidden))

    def _check_inputs(self, token_ids: Tensor, lengths: Sequence[int], cache: RaggedKVCache) -> None:
        if len(lengths) != cache.batch_size:
            raise InputError(f"{len(lengths)} sequences were given to a cache of {cache.batch_size}")
        if cache.owner != self._owner:
            raise InputError(
                f"the cache was written by another model or under another plan than {self.plan.name!r}; start a new one"
            )
        if cache.in_pass:
            raise InputError("an earlier pass over this cache failed and left it incomplete; start a new one")
        for seen, length in zip(cache.seq_lengths, lengths, strict=True):
            if seen + length > self.spec.max_positions:
                raise InputError(
                    f"a sequence of {seen + length} tokens is longer than the model's context"
                    f" of {self.spec.max_positions}"
                )
        prefill = token_ids.shape[0] > len(lengths)
        if token_ids.device.type == "cpu" or prefill:  # a check costs a device synchronisation in decode
            check_token_ids(token_ids, self.spec.vocab_size)


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Raise InputError where an id is not in [0, vocab_size)."""
    if token_ids.numel() == 0:
        raise InputError("no tokens were given")
    low, high = torch.stack(token_ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
