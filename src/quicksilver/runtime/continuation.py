"""What a cache given to `generate` must have in common with the prompt, and what of it is fed again."""

from torch import Tensor

from quicksilver.cache import RaggedKVCache
from quicksilver.errors import InputError


def leave_some_to_feed(cache: RaggedKVCache, columns: int) -> None:
    """Take the last column of a cache back where it holds all of a prompt's; all of it where tokens are fused there."""
    if columns == cache.fed.count:
        try:
            cache.crop(-1)
        except InputError:
            cache.reset()


def check_beginning(cache: RaggedKVCache, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise InputError where a prompt, [B, T] with a mask [B, T] or None, does not begin with what a cache holds."""
    cache.check_columns()
    seen, columns = cache.fed.count, input_ids.shape[1]
    remedy = "give all token ids so far, or the new ones alone with an attention_mask over both"
    if columns < seen:
        raise InputError(
            f"the cache holds {seen} columns and the prompt {columns}: the cache is not its beginning; {remedy}"
        )
    differs = input_ids[:, :seen].to(cache.shape.device) != cache.fed.token_ids
    for real in (cache.fed.real, attention_mask):
        if real is not None:
            differs &= real[:, :seen].to(differs.device) != 0
    if bool(differs.any()):
        row, column = differs.nonzero()[0].tolist()
        raise InputError(
            f"the cache is not the beginning of the prompt: in row {row} they differ at column {column}; {remedy}"
        )
