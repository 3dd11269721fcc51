"""Padded grids to ragged rows and back, as transformers' callers expect them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.errors import InputError, UnsupportedFeatureError


@dataclass(frozen=True)
class UnpaddedBatch:
    """The real tokens of a padded grid [B, T]."""

    token_ids: Tensor  # [N] real tokens, row by row
    lengths: list[int]  # real tokens of each row
    shape: tuple[int, int]  # (B, T)
    real: Tensor | None = None  # [B, T] bool, False at padding, or None where there is none
    places: Tensor | None = None  # [N] the tokens' places in the flattened grid, or None where there is no padding


def split_mask(attention_mask: Tensor | None, shape: tuple[int, ...], seen: int) -> tuple[Tensor | None, Tensor | None]:
    """Return what a mask [B, T] or [B, seen + T] says of `seen` columns before a grid, [B, seen] bool, and of it."""
    if attention_mask is None:
        return None, None
    batch, columns = shape
    if tuple(attention_mask.shape) not in (shape, (batch, seen + columns)):
        before = f" after {seen} columns in the cache" if seen else ""
        raise InputError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit input_ids {shape}{before}"
        )
    visible = attention_mask != 0
    before = visible[:, :seen] if seen and visible.shape[1] > columns else None
    return before, visible[:, visible.shape[1] - columns :]


def real_tokens(input_ids: Tensor, real: Tensor | None) -> UnpaddedBatch:
    """Take the real tokens, where `real` [B, T] is True, out of a padded grid [B, T]; None is for all of them."""
    batch, columns = input_ids.shape
    if real is None:
        return UnpaddedBatch(input_ids.reshape(-1), [columns] * batch, (batch, columns))
    lengths = real.sum(1).tolist()
    if sum(lengths) == batch * columns:
        return UnpaddedBatch(input_ids.reshape(-1), lengths, (batch, columns))
    places = real.flatten().nonzero().squeeze(-1)
    return UnpaddedBatch(input_ids.reshape(-1)[places], lengths, (batch, columns), real, places)


def check_positions(position_ids: Tensor, unpadded: UnpaddedBatch, seen: Sequence[int]) -> None:
    """Raise UnsupportedFeatureError where `position_ids`, [B, T] or [1, T], are not those of the real tokens."""
    batch, columns = unpadded.shape
    position_ids = torch.as_tensor(position_ids)
    if tuple(position_ids.shape) not in ((batch, columns), (1, columns)):
        raise InputError(f"position_ids of shape {tuple(position_ids.shape)} do not fit input_ids {unpadded.shape}")
    given = position_ids.expand(batch, columns).reshape(-1)
    given = given if unpadded.places is None else given[unpadded.places.to(given.device)]
    own = [first + i for first, length in zip(seen, unpadded.lengths, strict=True) for i in range(length)]
    if given.tolist() != own:
        raise UnsupportedFeatureError(
            "position_ids other than those that attention_mask and cache imply are not supported: a row's tokens are"
            f" at {own[0]} and on, padding not counted"
        )


Columns = int | slice | Tensor | Sequence[int] | None
"""Which columns' logits are wanted: so many of the last (0 or None: all), or which."""


def kept_columns(keep: Columns, columns: int, device: torch.device) -> Tensor | None:
    """Return which of so many columns' logits are wanted, [K], None for all; InputError where a column is not there."""
    if keep is None or (isinstance(keep, int) and (keep == 0 or keep >= columns)):
        return None
    every = torch.arange(columns, device=device)
    if isinstance(keep, int):
        return every[-keep:]
    try:
        if not isinstance(keep, slice):
            keep = torch.as_tensor(keep if isinstance(keep, Tensor) or len(keep) else every[:0]).to(device)
        return every[keep].reshape(-1)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"logits_to_keep does not choose among {columns} columns: {error}") from None


def padded_logits(
    hidden: Tensor, unpadded: UnpaddedBatch, kept: Tensor | None, head: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return logits [B, K, vocab] of columns [K] (None: all) from states [N, d] of real tokens; padding gets zeros."""
    batch, columns = unpadded.shape
    if kept is None and unpadded.places is None:
        return head(hidden).view(batch, columns, -1)
    kept = torch.arange(columns, device=hidden.device) if kept is None else kept
    if unpadded.places is None:
        rows = kept + columns * torch.arange(batch, device=hidden.device)[:, None]  # [B, K]
        logits = head(hidden[rows.flatten()])
        return logits.view(batch, len(kept), logits.shape[-1])
    row_of = torch.full((batch * columns,), -1, device=hidden.device)
    row_of[unpadded.places] = torch.arange(hidden.shape[0], device=hidden.device)
    rows = row_of.view(batch, columns)[:, kept].flatten()  # [B * K], -1 at padding
    real = rows >= 0
    logits = head(hidden[rows[real]])
    padded = logits.new_zeros((rows.shape[0], logits.shape[-1]))
    padded[real] = logits
    return padded.view(batch, len(kept), padded.shape[-1])


def shifted_loss(logits: Tensor, labels: Tensor, unpadded: UnpaddedBatch) -> Tensor:
    """Mean cross-entropy of each real token's prediction against the next label [B, T]; -100 is ignored."""
    targets = labels[:, 1:].to(logits.device)
    if unpadded.real is not None:
        targets = targets.masked_fill(~unpadded.real[:, :-1], -100)  # padding predicts nothing
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
