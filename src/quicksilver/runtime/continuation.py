"""What a cache given to `generate` must have in common with the prompt, and what of it is fed again."""

from __future__ import annotations

from torch import Tensor

from quicksilver.cache import RaggedKVCache
from quicksilver.errors import InputError


def rejoin(cache: RaggedKVCache, input_ids: Tensor, attention_mask: Tensor | None, mask_columns: int) -> None:
    """Make a cache the beginning of a prompt, at least one column of which is left to feed.

    Where the cache holds all of the prompt, its last column is taken back; all of it where tokens are fused there.

    Args:
        cache: of as many sequences; one that has seen nothing is left as it is.
        input_ids: [B, T] the whole prompt, or what is new of it: then the mask is longer.
        attention_mask: [B, mask_columns] or None where all is real.
        mask_columns: of the mask that was given, or that stands for none.

    Raises:
        InputError: the prompt does not begin with what the cache holds.
    """
    columns, seen = input_ids.shape[1], cache.get_seq_length()
    if seen == 0 or mask_columns > columns:
        return
    if cache.fed.count != seen:
        raise InputError("the cache was not filled by calls of the model, so a prompt cannot be compared with it")
    _check_prefix(cache, input_ids, attention_mask)
    if columns == seen:
        try:
            cache.crop(-1)
        except InputError:
            cache.reset()


def _check_prefix(cache: RaggedKVCache, input_ids: Tensor, attention_mask: Tensor | None) -> None:
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
