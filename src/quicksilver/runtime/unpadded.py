"""Padded grids to ragged rows and back, as transformers' callers expect them.

Which tokens run, and how, is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.errors import InputError, UnsupportedFeatureError


@dataclass(frozen=True)
class UnpaddedBatch:
    """The real tokens of a padded grid [B, T].

    Attributes:
        token_ids: [N] real tokens, row by row.
        lengths: real tokens of each row.
        shape: (B, T).
        real: [B, T] bool, False at padding, or None where there is none.
        places: [N] the tokens' places in the flattened grid, or None where there is no padding.
    """

    token_ids: Tensor
    lengths: list[int]
    shape: tuple[int, int]
    real: Tensor | None = None
    places: Tensor | None = None

    @property
    def columns(self) -> int:
        """T."""
        return self.shape[1]


def split_mask(attention_mask: Tensor | None, shape: tuple[int, ...], seen: int) -> tuple[Tensor | None, Tensor | None]:
    """Return what a mask says of the `seen` columns before a grid of shape (B, T), [B, seen] bool, and of it, [B, T].

    Raises:
        InputError: a mask that is neither [B, T] nor [B, seen + T].
    """
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
    """Raise UnsupportedFeatureError where tokens are given other positions than they have.

    Args:
        position_ids: [B, T] or [1, T]; what they say of padding does not matter.
        unpadded: the tokens.
        seen: tokens before each row's.
    """
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
    """Return which of so many columns' logits are wanted, indices [K]; None for all, in order.

    Args:
        keep: number of last columns (0 or None: all), or which, by indices that may count from the end, a slice or a
            mask [T].
        columns: T.
        device: of the result.

    Raises:
        InputError: indices of columns that there are not.
    """
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
    """Return logits [B, K, vocab] of some columns; only real tokens pass through the head, padding gets zeros.

    Args:
        hidden: [N, d] states of the grid's real tokens.
        unpadded: where they stand.
        kept: [K] columns, None for all.
        head: [M, d] to [M, vocab].
    """
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
