"""One text in three parts that do not overlap: to fit statistics, to search, and to verify what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quicksilver.errors import InputError
from quicksilver.measure.windows import Window, WindowedText

SHARES = (0.4, 0.25, 0.35)
_LEAST_WINDOWS = 8  # of the searched and of the held-out part: fewer give no interval worth the name


@dataclass(frozen=True)
class Part:
    """Windows of one text, or of several, one after another.

    Attributes:
        text: the windows.
        sections: name of each text, and how many of the windows are its.
    """

    text: WindowedText
    sections: tuple[tuple[str, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return sum(window.num_scored for window in self.text.windows)


@dataclass(frozen=True)
class Split:
    """Parts of a text.

    Attributes:
        fit: token ids [T] of windows that statistics are fitted to.
        search: windows that candidates are compared on.
        held_out: windows that the chosen plan is verified on.
    """

    fit: list[Tensor]
    search: Part
    held_out: Part


def split_all(texts: Sequence[WindowedText], fit_tokens: int, search_tokens: int, held_out_tokens: int) -> Split:
    """Cut each of several texts as `split` does, and put the parts together; tokens are shared out evenly.

    Raises:
        InputError: too little of a text for three parts.
    """
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

    A window that shares tokens with the part before is left out.

    Args:
        text: windows of all of it.
        fit_tokens: to be fed while fitting, at most.
        search_tokens: to be scored in the search, at most.
        held_out_tokens: to be scored in the verification, at most.

    Raises:
        InputError: too little text for three parts.
    """
    count = len(text.windows)
    first, second = int(count * SHARES[0]), int(count * (SHARES[0] + SHARES[1]))
    parts = (
        text.windows[:first],
        _apart(text.windows[first:second]),
        _apart(text.windows[second:]),
    )
    if not parts[0] or min(len(part) for part in parts[1:]) < _LEAST_WINDOWS:
        raise InputError(
            f"{text.name}: {count} windows are too few to fit, search and verify on apart"
            f" (about {4 * _LEAST_WINDOWS} are needed); give more text, or a shorter --context"
        )
    fit = [torch.tensor(window.token_ids) for window in _thinned(_disjoint(parts[0]), fit_tokens, fed=True)]
    search, held_out = (
        _part(text, name, _thinned(part, tokens, fed=False))
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


def _apart(windows: Sequence[Window]) -> Sequence[Window]:
    """Drop the first window where its context lies in the part before."""
    return windows[1:] if windows and windows[0].first_scored > 1 else windows


def _disjoint(windows: Sequence[Window]) -> list[Window]:
    """Return windows that share no tokens: with a stride of half the context every other one."""
    kept: list[Window] = []
    end = 0
    for window in windows:
        start = window.text_start - window.first_scored
        if not kept or start >= end or window.text_start < kept[-1].text_start:
            kept.append(window)
            end = start + len(window.token_ids)
    return kept


def _thinned(windows: Sequence[Window], tokens: int, fed: bool) -> list[Window]:
    """Return windows evenly spaced over a part, of at most so many tokens in all, but one at least."""
    total = sum(len(window.token_ids) if fed else window.num_scored for window in windows)
    count = max(min(int(len(windows) * tokens / max(total, 1)), len(windows)), 1)
    return [windows[int((i + 0.5) * len(windows) / count)] for i in range(count)]
