"""The loop from logits to tokens, greedy or sampling: one token of each sequence a step, until criteria end it.

What a step runs is the caller's; processors, criteria and the pass over the prompt are transformers', before the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, LogitsProcessor, MaxLengthCriteria, StoppingCriteria


class TokenChoice:
    """How the next tokens are chosen.

    Args:
        processors: change the logits, in this order.
        do_sample: draw from the distribution, instead of taking the likeliest.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], do_sample: bool) -> None:
        self._processors = tuple(processors)
        self._do_sample = do_sample

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Return the next token of each sequence, [B], given those before it [B, T] and its logits [B, vocab]."""
        scores: Any = logits
        for processor in self._processors:
            scores = processor(input_ids, scores)  # type: ignore[arg-type]
        if self._do_sample:
            return torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        return scores.argmax(-1)


class Ending:
    """Which sequences have ended, and what follows in them; kept on the host, which must know when to stop.

    Lengths and tokens that end a sequence are looked at here; criteria of every other kind are called.

    Args:
        criteria: say after each token which sequences end; the rest of the batch goes on.
        padding: the token, a scalar, that fills a sequence which has ended; None where there is none.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria], padding: Tensor | None) -> None:
        lengths = [each.max_length for each in criteria if type(each) is MaxLengthCriteria]
        tokens = [each.eos_token_id.reshape(-1).tolist() for each in criteria if type(each) is EosTokenCriteria]
        self._max_length = min(lengths, default=None)
        self._last_tokens = frozenset(token for each in tokens for token in each)
        self._others = [each for each in criteria if type(each) not in (MaxLengthCriteria, EosTokenCriteria)]
        self._padding = padding if any(hasattr(each, "eos_token_id") for each in criteria) else None
        self._ended: list[bool] = []

    def fill(self, tokens: Tensor) -> Tensor:
        """Return new tokens [B], those of sequences that have ended replaced by padding."""
        if self._padding is None or not any(self._ended):
            return tokens
        return tokens.masked_fill(torch.tensor(self._ended, device=tokens.device), self._padding)

    def reached(self, input_ids: Tensor, tokens: Tensor) -> bool:
        """Return whether all sequences have ended, given all tokens [B, T] and the last of each, [B]."""
        if self._last_tokens:
            self._end([token in self._last_tokens for token in tokens.tolist()])
        for criterion in self._others:
            ends = torch.as_tensor(criterion(input_ids, None))  # type: ignore[arg-type]
            self._end(ends.expand(input_ids.shape[0]).tolist())
        if self._max_length is not None and input_ids.shape[1] >= self._max_length:
            return True
        return bool(self._ended) and all(self._ended)

    def _end(self, ends: list[bool]) -> None:
        self._ended = [one or other for one, other in zip(self._ended, ends, strict=True)] if self._ended else ends


def extend(
    input_ids: Tensor,
    logits: Tensor,
    step: Callable[[Tensor], Tensor],
    choice: TokenChoice,
    ending: Ending,
    streamer: Any = None,
) -> Tensor:
    """Append tokens to sequences until all have ended.

    Args:
        input_ids: [B, T] tokens so far.
        logits: [B, vocab] of the first token to come.
        step: feeds new tokens [B]; returns the logits of those after them, [B, vocab].
        choice: of the tokens.
        ending: of the sequences; those that have ended are fed all the same.
        streamer: given each step's tokens, and told the end; None for nobody.

    Returns:
        All tokens, [B, T + steps].
    """
    while True:
        tokens = ending.fill(choice(input_ids, logits.to(input_ids.device, torch.float32)))
        input_ids = torch.cat((input_ids, tokens[:, None]), dim=1)
        ended = ending.reached(input_ids, tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if ended:
            break
        logits = step(tokens)
    if streamer is not None:
        streamer.end()
    return input_ids
