"""The padded grids that a cache was fed: which token stood in which column of which row, and which were padding."""

import torch
from torch import Tensor

from quicksilver.errors import InputError


class FedColumns:
    """Columns fed so far, of a batch of rows."""

    def __init__(self) -> None:
        self.count = 0  # columns fed, P
        self._token_ids: list[Tensor] = []  # [B, T] each; joined when they are asked for, not at every token
        self._real: Tensor | None = None  # [B, k] of the first k columns; those after them are all real

    @property
    def token_ids(self) -> Tensor:
        """[B, P] tokens, whatever they were at padding."""
        self._token_ids = [torch.cat(self._token_ids, dim=1)]
        return self._token_ids[0]

    @property
    def real(self) -> Tensor | None:
        """[B, P] bool, False at padding and at tokens taken back; None where all are real."""
        if self._real is not None and self._real.shape[1] < self.count:
            self._real = torch.nn.functional.pad(self._real, (0, self.count - self._real.shape[1]), value=True)
        return self._real

    def append(self, token_ids: Tensor, real: Tensor | None) -> None:
        """Add columns of token ids [B, T], not to be written to after, and of `real` [B, T] bool or None."""
        if real is not None:
            before = self.real
            if before is None:
                before = real.new_ones((real.shape[0], self.count))
            self._real = torch.cat((before, real.to(token_ids.device)), dim=1)
        self.count += token_ids.shape[1]
        self._token_ids.append(token_ids)

    def crop(self, count: int) -> None:
        """Forget all but the first `count` columns."""
        real = self.real
        self._token_ids = [self.token_ids[:, :count]]
        self._real = None if real is None else real[:, :count]
        self.count = count

    def take_rows(self, rows: Tensor) -> None:
        """Let the rows be those of indices [R] from now on."""
        real = self.real
        if self.count:
            self._token_ids = [self.token_ids[rows]]
        self._real = None if real is None else real[rows]

    def hide_last(self, row: int, count: int) -> None:
        """Count the last `count` real tokens of a row as padding."""
        real = self.real
        if real is None:
            real = torch.ones_like(self.token_ids, dtype=torch.bool)
        self._real = real = real.clone()
        real[row, real[row].nonzero()[-count:, 0]] = False

    def kept_by(self, visible: Tensor) -> list[int] | None:
        """Return how many tokens a mask [B, P] leaves of each row, None for all; InputError where a gap is left."""
        real = self.real
        if bool(visible.all()) if real is None else torch.equal(visible, real):
            return None
        real = torch.ones_like(visible) if real is None else real
        _refuse(visible & ~real, "shows column {column} of row {row}, which was padding, or has been taken back")
        gone = (real & ~visible).cumsum(1) > 0
        _refuse(
            visible & gone,
            "hides cached tokens of row {row} and shows column {column} after them; tokens can be taken back from the"
            " end alone: feed what is to be seen to a new cache",
        )
        return visible.sum(1).tolist()


def _refuse(wrong: Tensor, problem: str) -> None:
    """Raise InputError naming the first place, if any, of [B, P] bool."""
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise InputError(f"attention_mask {problem.format(row=row, column=column)}")
