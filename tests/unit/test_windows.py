"""Windows: every token scored once, bytes of what was scored, errors for what cannot be cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quicksilver.errors import InputError
from quicksilver.measure.texts import Corpus
from quicksilver.measure.windows import WindowConfig, cut, default_bos, slide
from tests import tiny


@given(st.integers(2, 200), st.integers(3, 40), st.booleans(), st.data())
def test_each_token_is_scored_exactly_once(count: int, context: int, bos: bool, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - bos))
    windows = slide(list(range(1, count + 1)), WindowConfig(context, stride, 0 if bos else None))
    scored = [token for window in windows for token in window.token_ids[window.first_scored :]]
    alone = set() if bos else {1, *(range(1, count + 1, stride) if stride == context else ())}
    assert scored == [token for token in range(1, count + 1) if token not in alone]
    for window in windows:
        assert len(window.token_ids) <= context
        assert window.first_scored >= 1
        assert (window.token_ids[0] == 0) == bos
        assert window.token_ids[window.first_scored] == window.text_start + 1


@given(st.integers(2, 200), st.integers(3, 40), st.booleans(), st.data())
def test_after_a_prompt_each_token_is_scored_exactly_once(
    count: int, context: int, bos: bool, data: st.DataObject
) -> None:
    prompt = data.draw(st.integers(1, context - bos - 1))
    stride = data.draw(st.integers(1, context - bos - prompt))
    windows = slide(list(range(1, count + 1)), WindowConfig(context, stride, 0 if bos else None, prompt=prompt))
    scored = [token for window in windows for token in window.token_ids[window.first_scored :]]
    assert scored == list(range(prompt + 1, count + 1))
    for window in windows:
        assert len(window.token_ids) <= context
        assert (window.token_ids[0] == 0) == bos
        assert window.first_scored == prompt + bos == window.prompt
        assert window.token_ids[window.first_scored] == window.text_start + 1


def test_context_left_of_a_scored_token_is_at_least_the_overlap() -> None:
    windows = slide(list(range(100)), WindowConfig(20, 5))
    assert all(window.first_scored >= 15 for window in windows[1:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 1), "too short"),
        ((8, 0), "stride"),
        ((8, 9), "stride"),
        ((8, 8, 3), "stride"),
        ((8, 4, None, 1), "max_tok"),
        ((8, 4, None, None, 0), "the prompt must lie between 1 and 7"),
        ((8, 4, 3, None, 7), "the prompt must lie between 1 and 6"),
        ((8, 4, None, None, 5), "between 1 and 3 for this context and a prompt of 5"),
    ],
)
def test_impossible_protocols_are_refused(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WindowConfig(*values)


def test_bytes_are_those_of_the_scored_text() -> None:
    tokenizer, text = tiny.tokenizer(), "naïve café " * 10
    whole = cut(Corpus("t", (text,), separate=False), tokenizer, WindowConfig(16, 8, bos_id=0))
    assert whole.scored_bytes == len(text.encode())
    assert sum(window.num_scored for window in whole.windows) == len(tokenizer(text).input_ids)
    first_unscored = cut(Corpus("t", (text,), separate=False), tokenizer, WindowConfig(16, 8))
    assert first_unscored.scored_bytes == len(text.encode()) - 1
    gaps = cut(Corpus("t", ("abcdefgh" * 4,), separate=False), tokenizer, WindowConfig(8, 8))
    assert gaps.scored_bytes == 4 * 7


def test_max_tokens_runs_across_documents() -> None:
    corpus = Corpus("docs", ("abcdef", "ghij", "klmnop"), separate=True)
    windowed = cut(corpus, tiny.tokenizer(), WindowConfig(16, 8, None, max_tokens=9))
    assert [len(window.token_ids) for window in windowed.windows] == [6, 3]
    assert windowed.scored_bytes == 5 + 2


def test_a_text_shorter_than_a_window_is_an_error_but_a_document_is_not() -> None:
    with pytest.raises(InputError, match="short: 3 tokens are fewer than one window of 16"):
        cut(Corpus("short", ("abc",), separate=False), tiny.tokenizer(), WindowConfig(16, 8))
    with pytest.raises(InputError, match=r"short: 5 tokens \(max_tokens 5\)"):
        cut(Corpus("short", ("abc" * 99,), separate=False), tiny.tokenizer(), WindowConfig(16, 8, None, 5))
    assert len(cut(Corpus("short", ("abc",), separate=True), tiny.tokenizer(), WindowConfig(16, 8)).windows) == 1
    with pytest.raises(InputError, match="no text long enough"):
        cut(Corpus("short", ("a",), separate=True), tiny.tokenizer(), WindowConfig(16, 8))


def test_bos_is_used_where_the_tokenizer_prepends_it() -> None:
    assert default_bos(tiny.tokenizer()) is None
