"""Padded grids to ragged rows and back, as transformers' callers expect them.

Which tokens run, and how, is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.errors import InputError


@dataclass(frozen=True)
class Grid:
    """The real tokens of a padded grid [B, T].

    Attributes:
        token_ids: [N] real tokens, row by row.
        lengths: real tokens of each row.
        shape: (B, T).
        places: [N] their places in the flattened grid, or None where there is no padding.
    """

    token_ids: Tensor
    lengths: list[int]
    shape: tuple[int, int]
    places: Tensor | None

    @property
    def columns(self) -> int:
        """T."""
        return self.shape[1]


def real_tokens(input_ids: Tensor, attention_mask: Tensor | None, seen: int) -> Grid:
    """Take the real tokens out of a padded grid [B, T] that follows `seen` columns.

    Raises:
        InputError: a mask that is neither [B, T] nor [B, seen + T].
    """
    batch, columns = input_ids.shape
    if attention_mask is None:
        return Grid(input_ids.reshape(-1), [columns] * batch, (batch, columns), None)
    if tuple(attention_mask.shape) not in ((batch, columns), (batch, seen + columns)):
        raise InputError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit input_ids {tuple(input_ids.shape)}"
        )
    real = attention_mask[:, -columns:].to(input_ids.device) != 0
    lengths = real.sum(1).tolist()
    if sum(lengths) == batch * columns:
        return Grid(input_ids.reshape(-1), lengths, (batch, columns), None)
    places = real.flatten().nonzero().squeeze(-1)
    return Grid(input_ids.reshape(-1)[places], lengths, (batch, columns), places)


def grid_logits(hidden: Tensor, grid: Grid, keep: int | Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Return logits [B, K, vocab] of some columns; only real tokens pass through the head, padding gets zeros.

    Args:
        hidden: [N, d] states of the grid's real tokens.
        grid: where they stand.
        keep: number of last columns to keep (0: all), or their indices [K].
        head: [M, d] to [M, vocab].
    """
    batch, columns = grid.shape
    if columns == 1 and grid.places is None and isinstance(keep, int):
        return head(hidden).view(batch, 1, -1)
    kept = torch.arange(columns, device=hidden.device)
    kept = kept[-keep:] if isinstance(keep, int) else kept[keep.to(kept.device)]
    if grid.places is None:
        rows = kept + columns * torch.arange(batch, device=hidden.device)[:, None]  # [B, K]
        chosen = hidden if len(kept) == columns else hidden[rows.flatten()]
        return head(chosen).view(batch, len(kept), -1)
    row_of = torch.full((batch * columns,), -1, device=hidden.device)
    row_of[grid.places] = torch.arange(hidden.shape[0], device=hidden.device)
    rows = row_of.view(batch, columns)[:, kept].flatten()  # [B * K], -1 at padding
    real = rows >= 0
    logits = head(hidden[rows[real]])
    padded = logits.new_zeros((rows.shape[0], logits.shape[-1]))
    padded[real] = logits
    return padded.view(batch, len(kept), -1)


def shifted_loss(logits: Tensor, labels: Tensor, grid: Grid) -> Tensor:
    """Mean cross-entropy of each real token's prediction against the next label; labels of -100 are ignored.

    Raises:
        InputError: labels of another shape than the grid.
    """
    if tuple(labels.shape) != grid.shape:
        raise InputError(f"labels of shape {tuple(labels.shape)} do not fit input_ids {grid.shape}")
    targets = labels[:, 1:].to(logits.device)
    if grid.places is not None:
        real = torch.zeros(grid.shape, dtype=torch.bool, device=logits.device)
        real.view(-1)[grid.places] = True
        targets = targets.masked_fill(~real[:, :-1], -100)  # padding predicts nothing
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
