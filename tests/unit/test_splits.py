"""A text in three parts: in order, sharing no token, thinned evenly, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from quicksilver.calibrate.observe import PROTECTED
from quicksilver.calibrate.splits import Part, Split, split, split_all
from quicksilver.errors import InputError
from quicksilver.measure.windows import Window, WindowConfig, WindowedText, slide

ALL = 10**9
WINDOW_CONFIGS = {
    "half": WindowConfig(32, 16),
    "half, odd": WindowConfig(33, 16),
    "half, BOS": WindowConfig(32, 16, bos_id=0),
    "apart": WindowConfig(32, 32),
    "prompts": WindowConfig(32, 8, prompt=24),
    "prompts, BOS": WindowConfig(32, 7, bos_id=0, prompt=24),
    "short prompts": WindowConfig(32, 24, prompt=8),
}


def text_of(lengths: Sequence[int], window_config: WindowConfig) -> WindowedText:
    """Return the windows of documents, in which every token id occurs once; 0 is BOS."""
    windows: list[Window] = []
    first = 1
    for length in lengths:
        windows += slide(list(range(first, first + length)), window_config)
        first += length
    return WindowedText("book.txt", tuple(windows), 3 * sum(window.num_scored for window in windows))


def fed(parts: Split) -> list[set[int]]:
    """Return the tokens that each part feeds, context and all."""
    return [
        {i for ids in parts.fit for i in ids.tolist()} - {0},
        *(
            {i for window in part.text.windows for i in window.token_ids} - {0}
            for part in (parts.search, parts.held_out)
        ),
    ]


@pytest.mark.parametrize("lengths", [[3000], [40] * 60, [20] * 99, [500, 30, 90, 900, 700], [31, 17, 100] * 30])
@pytest.mark.parametrize("window_config", WINDOW_CONFIGS.values(), ids=list(WINDOW_CONFIGS))
def test_parts_share_no_token_and_come_in_order(lengths: list[int], window_config: WindowConfig) -> None:
    if window_config.prompt is not None:
        lengths = [max(length, 48) for length in lengths]
    parts = split(text_of(lengths, window_config), ALL, ALL, ALL)
    fit, search, held_out = fed(parts)
    assert max(fit) < min(search)
    assert max(search) < min(held_out)
    tokens = [i for ids in parts.fit for i in ids.tolist() if i]
    assert len(tokens) == len(set(tokens))  # statistics see no token twice
    for part in (parts.search, parts.held_out):
        scored = [i for window in part.text.windows for i in window.token_ids[window.first_scored :]]
        assert scored == sorted(set(scored))


@pytest.mark.parametrize("lengths", [[3000], [30] * 100, [20] * 150])
def test_parts_are_most_of_the_text(lengths: list[int]) -> None:
    """Documents of one window each are as good as one long text."""
    parts = split(text_of(lengths, WindowConfig(32, 16)), ALL, ALL, ALL)
    shares = [len(part) / 3000 for part in fed(parts)]
    assert shares == pytest.approx([0.4, 0.25, 0.35], abs=0.05)


@pytest.mark.parametrize(("window_config", "limit"), [(WindowConfig(32, 16), 300), (WindowConfig(32, 32), 700)])
def test_parts_are_thinned_evenly(window_config: WindowConfig, limit: int) -> None:
    text = text_of([6000], window_config)
    whole, parts = split(text, ALL, ALL, ALL), split(text, limit, limit, limit)
    counts = [sum(map(len, parts.fit))]
    counts += [part.tokens for part in (parts.search, parts.held_out)]
    for count in counts:
        assert limit - 32 <= count <= limit
    for one, other in (
        ([ids[0].item() for ids in whole.fit], [ids[0].item() for ids in parts.fit]),
        *(
            ([window.text_start for window in a.text.windows], [window.text_start for window in b.text.windows])
            for a, b in ((whole.search, parts.search), (whole.held_out, parts.held_out))
        ),
    ):
        assert set(other) <= set(one)
        gaps = [b - a for a, b in pairwise(other)]
        assert max(gaps) - min(gaps) <= one[1] - one[0]  # a window more or less
        assert other[0] - one[0] <= max(gaps)
        assert one[-1] - other[-1] <= max(gaps)


def test_few_tokens_are_still_windows_enough_for_an_interval() -> None:
    parts = split(text_of([3000], WindowConfig(32, 16)), 10, 10, 10)
    assert len(parts.fit) == 1
    assert len(parts.search.text.windows) == len(parts.held_out.text.windows) == 8


def test_nothing_is_fitted_to_windows_of_attention_sinks_alone() -> None:
    lengths = [PROTECTED, 30, 2, PROTECTED + 1] * 40
    parts = split(text_of(lengths, WindowConfig(32, 16)), ALL, ALL, ALL)
    assert {len(ids) for ids in parts.fit} == {30, PROTECTED + 1}


def test_bytes_are_those_of_the_part() -> None:
    text = text_of([3000], WindowConfig(32, 16))
    parts = split(text, ALL, ALL, 200)
    for part, name in ((parts.search, "search part"), (parts.held_out, "held-out part")):
        assert part.text.scored_bytes == pytest.approx(3 * part.tokens, abs=1)
        assert part.text.name == f"book.txt, {name}"


def test_several_texts_are_cut_each_for_itself() -> None:
    texts = [text_of([3000], WindowConfig(32, 16)), replace(text_of([40] * 60, WindowConfig(32, 16)), name="web.jsonl")]
    parts, apart = split_all(texts, ALL, 400, 600), [split(text, ALL, 200, 300) for text in texts]
    for part, each in (
        (parts.search, [one.search for one in apart]),
        (parts.held_out, [one.held_out for one in apart]),
    ):
        assert part.text.windows == sum((one.text.windows for one in each), ())
        assert part.sections == tuple((text.name, len(one.text.windows)) for text, one in zip(texts, each, strict=True))
    assert len(parts.fit) == sum(len(one.fit) for one in apart)


@pytest.mark.parametrize("lengths", [[300], [32], [30] * 20, [3] * 8])
def test_too_little_text_is_refused(lengths: list[int]) -> None:
    text = text_of(lengths, WindowConfig(32, 16))
    with pytest.raises(InputError, match=rf"book\.txt: {len(text.windows)} windows are too few"):
        split(text, ALL, ALL, ALL)


def test_the_least_text_that_will_do() -> None:
    """What is said to be needed is enough."""
    text = text_of([32 * 40], WindowConfig(32, 32))
    for count in range(41):
        some = WindowedText(text.name, text.windows[:count], 100)
        if count >= 35:
            split(some, ALL, ALL, ALL)
        elif count < 20:
            with pytest.raises(InputError):
                split(some, ALL, ALL, ALL)


def test_a_part_is_thinned_text_by_text() -> None:
    windows = tuple(Window(tuple(range(10)), 10 - n, 0) for n in (1, 2, 3, 4, 5))
    part = Part(WindowedText("two texts", windows, 150), (("one", 3), ("two", 2)))
    thin = part.thinned(2)
    assert thin.text.windows == (windows[0], windows[2], windows[3])
    assert thin.sections == (("one", 2), ("two", 1))
    assert thin.tokens == 8
    assert thin.text.scored_bytes == 80
    assert part.thinned(1) == part
