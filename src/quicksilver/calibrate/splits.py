"""One text in three parts that do not overlap: to fit statistics, to search, and to verify what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile

import torch
from torch import Tensor

from quicksilver.calibrate.observe import PROTECTED
from quicksilver.errors import InputError
from quicksilver.measure.windows import Window, WindowedText

SHARES = (0.4, 0.25, 0.35)
_LEAST_WINDOWS = 8  # of the searched and of the held-out part: fewer give no interval worth the name


@dataclass(frozen=True)
class Part:
    """Windows of one text, or of several, one after another."""

    text: WindowedText  # the windows
    sections: tuple[tuple[str, int], ...]  # name of each text, and how many of the windows are its

    @property
    def tokens(self) -> int:
        return sum(window.num_scored for window in self.text.windows)

    def thinned(self, step: int) -> Part:
        """Return every `step`-th window of each text; bytes are estimated."""
        windows: list[Window] = []
        sections, start = [], 0
        for name, count in self.sections:
            kept = self.text.windows[start : start + count : step]
            windows += kept
            sections.append((name, len(kept)))
            start += count
        size = round(self.text.scored_bytes * sum(window.num_scored for window in windows) / self.tokens)
        return Part(WindowedText(self.text.name, tuple(windows), size), tuple(sections))


@dataclass(frozen=True)
class Split:
    """Parts of a text."""

    fit: list[Tensor]  # token ids [T] of windows that statistics are fitted to
    search: Part  # windows that candidates are compared on
    held_out: Part  # windows that the chosen plan is verified on


def split_all(texts: Sequence[WindowedText], fit_tokens: int, search_tokens: int, held_out_tokens: int) -> Split:
    """Cut each of several texts as `split` does, and put the parts together; tokens are shared out evenly."""
    count = len(texts)
    splits = [split(text, fit_tokens // count, search_tokens // count, held_out_tokens // count) for text in texts]
    search, held_out = (
        Part(_joined([part.text for part in parts]), tuple(section for part in parts for section in part.sections))
        for parts in ([each.search for each in splits], [each.held_out for each in splits])
    )
    return Split([window for each in splits for window in each.fit], search, held_out)


def _joined(texts: Sequence[WindowedText]) -> WindowedText:
    return WindowedText(
        " and ".join(text.name for text in texts),
        tuple(window for text in texts for window in text.windows),
        sum(text.scored_bytes for text in texts),
    )


def split(text: WindowedText, fit_tokens: int, search_tokens: int, held_out_tokens: int) -> Split:
    """Cut the windows of a text into three parts, one after another, and thin each out evenly to a number of tokens.

    Windows that share tokens with the part before are left out, and from the fitted part those that hold nothing but
    attention sinks. The searched and the held-out part keep as many windows as an interval needs, whatever the limit.

    Raises:
        InputError: too little text for three parts.
    """
    count = len(text.windows)
    first, second = int(count * SHARES[0]), int(count * (SHARES[0] + SHARES[1]))
    parts = (
        text.windows[:first],
        _apart(text.windows[first:second], text.windows[:first]),
        _apart(text.windows[second:], text.windows[:second]),
    )
    fitted = [window for window in _disjoint(parts[0]) if len(window.token_ids) > PROTECTED]
    if not fitted or min(len(part) for part in parts[1:]) < _LEAST_WINDOWS:
        raise InputError(
            f"{text.name}: {count} windows are too few to fit, search and verify on apart"
            f" (about {4 * _LEAST_WINDOWS} are needed); give more text, or a shorter --context"
        )
    fit = [torch.tensor(window.token_ids) for window in _thinned(fitted, fit_tokens, fed=True)]
    search, held_out = (
        _part(text, name, _thinned(part, tokens, fed=False, least=_LEAST_WINDOWS))
        for name, part, tokens in (
            ("search part", parts[1], search_tokens),
            ("held-out part", parts[2], held_out_tokens),
        )
    )
    return Split(fit, search, held_out)


def _part(text: WindowedText, name: str, windows: Sequence[Window]) -> Part:
    """Return a part of a text; its bytes are estimated from the whole text's bytes per token."""
    scored, of_all = (sum(window.num_scored for window in each) for each in (windows, text.windows))
    size = round(text.scored_bytes * scored / of_all)
    return Part(WindowedText(f"{text.name}, {name}", tuple(windows), size), ((text.name, len(windows)),))


def _apart(windows: Sequence[Window], before: Sequence[Window]) -> Sequence[Window]:
    """Drop first windows that share tokens with the last one of the part before."""
    return list(dropwhile(partial(_overlap, before[-1]), windows)) if before else windows


def _disjoint(windows: Sequence[Window]) -> list[Window]:
    """Return windows that share no tokens: with a stride of half the context every other one."""
    kept: list[Window] = []
    for window in windows:
        if not kept or not _overlap(kept[-1], window):
            kept.append(window)
    return kept


def _overlap(one: Window, later: Window) -> bool:
    """Whether a window shares tokens with a later one, which is of another document where it does not score later."""
    start = later.text_start - later.first_scored
    end = one.text_start - one.first_scored + len(one.token_ids)
    return later.text_start > one.text_start and start < end


def _thinned(windows: Sequence[Window], tokens: int, fed: bool, least: int = 1) -> list[Window]:
    """Return windows evenly spaced over a part, of at most so many tokens in all, but so many windows at least."""
    total = sum(len(window.token_ids) if fed else window.num_scored for window in windows)
    count = max(min(int(len(windows) * tokens / max(total, 1)), len(windows)), least)
    return [windows[int((i + 0.5) * len(windows) / count)] for i in range(count)]
