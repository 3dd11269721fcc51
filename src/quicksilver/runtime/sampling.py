"""From logits to the next tokens of a batch, greedily or by sampling, and when each of its rows has ended."""

import hashlib
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from quicksilver.errors import InputError

Floats = np.ndarray[Any, np.dtype[np.float32]]
_TRIED = 1000  # random numbers


class Rows:
    """The tokens [B, T] of a batch as they grow, with their padding and, by `real` ([B, T] bool or None), without."""

    def __init__(self, input_ids: Tensor, real: Tensor | None) -> None:
        self.input_ids = input_ids
        self._alone = None if real is None else [row[mask] for row, mask in zip(input_ids, real, strict=True)]

    @property
    def parts(self) -> list[Tensor]:
        """What processors see: each row without its padding, [1, t], or all as one where there is none."""
        return [self.input_ids] if self._alone is None else [row[None] for row in self._alone]

    def append(self, tokens: Tensor) -> None:
        """Add tokens [B]."""
        self.input_ids = torch.cat((self.input_ids, tokens[:, None]), dim=1)
        if self._alone is not None:
            self._alone = [torch.cat((row, token)) for row, token in zip(self._alone, tokens.split(1), strict=True)]


@dataclass(frozen=True)
class Draw:
    """How a token is drawn from scores."""

    do_sample: bool  # by their softmax; else the likeliest, the first of several
    # of each row: a token is a function of the row's seed, its place and the scores. None is for PyTorch's generator.
    seeds: Sequence[tuple[int, int]] | None = None

    def __call__(self, scores: Tensor, positions: Sequence[int]) -> Tensor:
        """Return tokens [B] at positions of their rows, from scores [B, vocab]."""
        if not self.do_sample:
            return likeliest(scores)
        if self.seeds is None:
            return drawn(scores.softmax(-1))
        rows = zip(scores.cpu(), self.seeds, positions, strict=True)
        tokens = [keyed_token(row, keyed_uniform(*seed, position)) for row, seed, position in rows]
        return torch.tensor(tokens, device=scores.device)


def likeliest(scores: Tensor) -> Tensor:
    """Return the token of the largest of scores [B, vocab], the first of several, [B]."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.argmax(-1)
    # The same in a tenth of the time, and by this thread: PyTorch's would still wait awake when the kernels' set out.
    return torch.from_numpy(scores.numpy().argmax(-1))


def drawn(shares: Tensor) -> Tensor:
    """Return tokens [B] from shares [B, vocab]: those of `torch.multinomial`, which takes three times as long.

    Each token waits for a time of exponential distribution, and the first comes. PyTorch makes these one by one, each
    from a float64 of its generator; here they are made from the same numbers all at once.
    """
    if shares.device.type == "cpu" and shares.dtype == torch.float32 and _waits_are_of_uniforms():
        waits = _waits(torch.empty(shares.shape, dtype=torch.float64).uniform_())
        tokens = torch.from_numpy(np.divide(shares.numpy(), waits, out=waits).argmax(-1))
        if bool((shares.gather(1, tokens[:, None]) > 0).all()):
            return tokens
    return torch.multinomial(shares, 1).squeeze(1)  # which says, too, where shares are none


def _waits(uniforms: Tensor) -> Floats:
    waits = uniforms.neg_().numpy()  # in place: room for vocabularies costs more than what is done there
    return np.negative(np.log1p(waits, out=waits), out=waits).astype(np.float32)


@cache
def _waits_are_of_uniforms() -> bool:
    """Whether PyTorch's generator makes exponentials on this machine as `drawn` supposes."""
    own, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    waits = torch.empty(_TRIED).exponential_(generator=own).numpy()
    tried = _waits(torch.empty(_TRIED, dtype=torch.float64).uniform_(generator=other))
    return np.array_equal(waits, tried) and torch.equal(own.get_state(), other.get_state())


def keyed_token(scores: Tensor, uniform: float) -> int:
    """Return the token of scores [vocab] in whose share of their softmax, laid end to end, a number from [0, 1) lies.

    Raises:
        InputError: there is no such token.
    """
    tokens = np.flatnonzero((scores != -torch.inf).numpy())
    kept = scores[tokens] if len(tokens) < len(scores) else scores
    ends = kept.softmax(-1, dtype=torch.float64).cumsum_(-1)
    if not (len(tokens) and ends[-1].isfinite()):
        raise InputError("no token can be drawn: every score is minus infinity, or one is not a number")
    return int(tokens[min(int(torch.searchsorted(ends, uniform * ends[-1], right=True)), len(tokens) - 1)])


def keyed_uniform(seed: int, sequence: int, position: int) -> float:
    """Return a number from [0, 1) that depends on these alone: 53 bits of their BLAKE2b hash."""
    key = struct.pack("<QQQ", seed, sequence, position)
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


@dataclass(frozen=True)
class TokenChoice:
    """How the next tokens are chosen."""

    first: Sequence[LogitsProcessor]  # processors that see the batch as it is, padded, before all others
    of_parts: Sequence[Sequence[LogitsProcessor]]  # processors of each of a batch's parts (see `Rows.parts`)
    of_batch: Sequence[LogitsProcessor]  # those that follow, which see the batch as it is, padded
    draw: Draw  # of a token

    def __call__(self, rows: Rows, logits: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the next tokens [B], given rows and their logits [B, vocab], and the scores they were chosen by."""
        scores = _process(rows.input_ids, logits, self.first) if self.first else logits
        if any(self.of_parts):
            parts = zip(rows.parts, scores.split(len(scores) // len(self.of_parts)), self.of_parts, strict=True)
            processed = [_process(ids, part, processors) for ids, part, processors in parts]
            scores = torch.cat(processed) if len(processed) > 1 else processed[0]
        scores = _process(rows.input_ids, scores, self.of_batch) if self.of_batch else scores
        return self.draw(scores, positions), scores


def _process(input_ids: Tensor, scores: Any, processors: Sequence[LogitsProcessor]) -> Any:
    for processor in processors:
        scores = processor(input_ids, scores)  # type: ignore[arg-type]
    return scores


@dataclass
class Ending:
    """Which rows have ended, and what follows in them; kept on the host, which must know when to stop."""

    ended: list[bool]  # of each row
    left: int  # tokens that may be added to each
    eos: Collection[int]  # tokens that end a row
    of_parts: Sequence[StoppingCriteria]  # criteria that look at a row's text (see `Rows.parts`)
    of_batch: Sequence[StoppingCriteria]  # the caller's own, which see the batch as it is, padded
    # fills a row that has ended; None where rows that criteria ended go on while others run, as in transformers where
    # there is no EOS
    padding: int | None
    scores: Callable[[], Any]  # given to the caller's own criteria

    @property
    def running(self) -> list[bool]:
        """Which rows go on."""
        return [not ended or self.padding is None for ended in self.ended]

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.left < 1 or all(self.ended)

    def fill(self, tokens: Tensor, running: Sequence[bool]) -> Tensor:
        """Return new tokens [B], those of rows that do not go on replaced by padding."""
        if all(running):
            return tokens
        return tokens.masked_fill(~torch.tensor(running, device=tokens.device), self.padding or 0)

    def look(self, rows: Rows, tokens: Tensor) -> None:
        """See which rows have ended, now that tokens [B], the last of each, were added."""
        self.left -= 1
        if self.eos:
            self._end([token in self.eos for token in tokens.tolist()])
        for criterion in self.of_parts:
            self._end([end for part in rows.parts for end in _ends(criterion, part, None)])
        for criterion in self.of_batch:
            self._end(_ends(criterion, rows.input_ids, self.scores()))

    def _end(self, ends: Sequence[bool]) -> None:
        self.ended = [one or bool(other) for one, other in zip(self.ended, ends, strict=True)]


def _ends(criterion: StoppingCriteria, input_ids: Tensor, scores: Any) -> list[bool]:
    return torch.as_tensor(criterion(input_ids, scores)).expand(len(input_ids)).tolist()  # type: ignore[arg-type]
