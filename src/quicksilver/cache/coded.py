"""Rows kept in fewer bits, as whole numbers with one scale for each vector or as bfloat16; read back, what those mean.

Which rows are kept so is the caller's business; in buffers they look like any others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quicksilver.cache.buffers import Account, RowBuffer

LARGEST_CODE = 127
SCALE_BYTES = 4  # float32


def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [..., D] int8 of rows [..., D] and scales [...] float32: each vector's largest magnitude is 127.

    Rounded to nearest, symmetric about 0. A vector of zeros, or of magnitudes too small for a float32 scale, has scale
    0 and is read back as zeros; one that holds infinity or NaN is read back as NaN.
    """
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scales = (exact.abs().amax(-1) / LARGEST_CODE).float()
    levels = exact / scales.to(exact.dtype).masked_fill(scales == 0, 1.0)[..., None]
    codes = levels.masked_fill(scales[..., None] == 0, 0.0).nan_to_num(0.0).round()
    return codes.clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what codes [..., D] of scales [...] mean, in a dtype."""
    exact = torch.promote_types(dtype, torch.float32)
    return (codes.to(exact) * scales.to(exact)[..., None]).to(dtype)


class CodedRowBuffer:
    """Like `RowBuffer`, but rows are kept as int8 codes and a float32 scale for each vector of their last dimension.

    Args:
        row_shape: shape of one row.
        dtype: of rows as they are given and read back.
        device: where the rows live.
        account: of what the buffer's bytes are part, None for nothing.
    """

    def __init__(
        self, row_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, account: Account | None = None
    ) -> None:
        self._codes = RowBuffer(row_shape, torch.int8, device, account)
        self._scales = RowBuffer(row_shape[:-1], torch.float32, device, account)
        self._dtype = dtype

    @property
    def length(self) -> int:
        """Rows held; rows may be taken off the end by making it less."""
        return self._codes.length

    @length.setter
    def length(self, length: int) -> None:
        self._codes.length = self._scales.length = length

    def append(self, rows: Tensor) -> None:
        """Add rows [M, *row_shape]; amortised cost O(M)."""
        codes, scales = encode(rows)
        self._codes.append(codes)
        self._scales.append(scales)

    def parts(self) -> tuple[RowBuffer, RowBuffer | None]:
        """Return what holds the codes and what holds their scales."""
        return self._codes, self._scales

    @property
    def rows(self) -> Tensor:
        """[length, *row_shape] what the rows held mean, computed anew."""
        return decode(self._codes.rows, self._scales.rows, self._dtype)

    @property
    def used_nbytes(self) -> int:
        """Bytes of the rows held."""
        return self._codes.used_nbytes + self._scales.used_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return self._codes.nbytes + self._scales.nbytes

    def trim(self) -> None:
        """Give back the room to grow."""
        self._codes.trim()
        self._scales.trim()


class RoundedRowBuffer(RowBuffer):
    """Like `RowBuffer`, but rows are kept as bfloat16.

    Args:
        row_shape: shape of one row.
        dtype: of rows as they are given and read back.
        device: where the rows live.
        account: of what the buffer's bytes are part, None for nothing.
    """

    def __init__(
        self, row_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, account: Account | None = None
    ) -> None:
        super().__init__(row_shape, torch.bfloat16, device, account)
        self._dtype = dtype

    @property
    def rows(self) -> Tensor:
        """[length, *row_shape] the rows held; a view where the dtype is bfloat16."""
        return self.kept.to(self._dtype)
