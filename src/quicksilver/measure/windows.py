"""Sliding windows: each token of a text is scored once, by the first window that holds it."""

from dataclasses import dataclass
from typing import Any

from quicksilver.errors import InputError
from quicksilver.measure.texts import Corpus


@dataclass(frozen=True)
class WindowConfig:
    """How a text is cut."""

    context: int  # tokens of a window, BOS included
    stride: int  # tokens by which each window begins after the one before
    bos_id: int | None = None  # prepended to every window, or None
    max_tokens: int | None = None  # tokens of text used in all, or None for all of them
    # first tokens of every window that are fed as a prompt and never scored, or None: then a window's context is what
    # earlier windows scored. A window scores `stride` tokens after its prompt.
    prompt: int | None = None

    @property
    def room(self) -> int:
        return self.context - (self.bos_id is not None)

    def __post_init__(self) -> None:
        room = self.room
        if self.prompt is not None:
            if not 1 <= self.prompt < room:
                raise InputError(f"the prompt must lie between 1 and {room - 1} for this context, got {self.prompt}")
            room -= self.prompt
        if self.room < 2:
            raise InputError(f"a context of {self.context} tokens is too short to score anything")
        if not 1 <= self.stride <= room:
            after = "" if self.prompt is None else f" and a prompt of {self.prompt}"
            raise InputError(f"the stride must lie between 1 and {room} for this context{after}, got {self.stride}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise InputError(f"max_tokens must be at least 2, got {self.max_tokens}")


@dataclass(frozen=True)
class Window:
    """Tokens to feed, and which of them are scored."""

    token_ids: tuple[int, ...]  # BOS included where there is one
    first_scored: int  # index in `token_ids` of the first token scored; the rest after it are scored too
    text_start: int  # index of that token in the text
    prompt: int = 0  # tokens that are fed apart as a prompt in `score` too, BOS included; the last of them predicts

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.first_scored


@dataclass(frozen=True)
class WindowedText:
    """A corpus ready to score: its windows, and the bytes of the text that they score."""

    name: str
    windows: tuple[Window, ...]
    scored_bytes: int


def default_bos(tokenizer: Any) -> int | None:
    """Return the BOS id where the tokenizer itself prepends it, else None."""
    ids = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids and ids[0] == bos else None


def cut(corpus: Corpus, tokenizer: Any, window_config: WindowConfig) -> WindowedText:
    """Tokenize a corpus and cut it into windows; InputError where a text, but no document, is shorter than one."""
    windows: list[Window] = []
    scored_bytes, left = 0, window_config.max_tokens
    for text in corpus.texts:
        if left is not None and left < 2:
            break
        all_ids, offsets = _tokenize(tokenizer, text)
        ids = all_ids[:left]
        room = window_config.room
        if not corpus.separate and len(ids) < room:
            limit = "" if window_config.max_tokens is None else f" (max_tokens {window_config.max_tokens})"
            raise InputError(
                f"{corpus.name}: {len(ids)} tokens{limit} are fewer than one window of {window_config.context};"
                " choose a shorter context, or more tokens where there are more"
            )
        fresh = slide(ids, window_config)
        if left is not None and (
            fresh or not window_config.prompt
        ):  # a document no longer than the prompt costs nothing
            left -= len(ids)
        windows += fresh
        scored_bytes += sum(_scored_bytes(text, len(all_ids), offsets, window) for window in fresh)
    if not windows:
        raise InputError(f"{corpus.name}: no text long enough to score")
    return WindowedText(corpus.name, tuple(windows), scored_bytes)


def slide(token_ids: list[int], window_config: WindowConfig) -> list[Window]:
    """Cut token ids into windows; a token with nothing before it in its window cannot be scored."""
    bos = () if window_config.bos_id is None else (window_config.bos_id,)
    if window_config.prompt is not None:
        return _slide_prompts(token_ids, bos, window_config.prompt, window_config.stride)
    room = window_config.room
    windows, done = [], 0
    for start in range(0, len(token_ids), window_config.stride):
        end = min(start + room, len(token_ids))
        first = max(done, start if bos else start + 1)
        if end > first:
            windows.append(Window((*bos, *token_ids[start:end]), first - start + len(bos), first))
        done = end
        if end == len(token_ids):
            break
    return windows


def _slide_prompts(token_ids: list[int], bos: tuple[int, ...], prompt: int, stride: int) -> list[Window]:
    """Cut windows of a prompt and what is scored after it."""
    windows = []
    for start in range(0, len(token_ids) - prompt, stride):
        ids = (*bos, *token_ids[start : start + prompt + stride])
        first = len(bos) + prompt
        windows.append(Window(ids, first, start + prompt, first))
    return windows


def _tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Return ids and, where the tokenizer can tell, the characters [start, end) each came from."""
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer(text, add_special_tokens=False).input_ids, None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded.input_ids, encoded.offset_mapping


def _scored_bytes(text: str, num_tokens: int, offsets: list[tuple[int, int]] | None, window: Window) -> int:
    """Return the UTF-8 bytes of the text behind a window's scored tokens; in proportion without offsets."""
    first, last = window.text_start, window.text_start + window.num_scored - 1
    if offsets is None:
        size = len(text.encode())
        return size * (last + 1) // num_tokens - size * first // num_tokens  # so that windows add up to the whole
    start = offsets[first - 1][1] if first else 0  # a character cut by two tokens counts once
    return len(text[start : offsets[last][1]].encode())
