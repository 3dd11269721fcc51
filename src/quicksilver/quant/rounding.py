"""Choosing codes for a matrix: the nearest levels, or levels that make up for one another's errors."""

from collections.abc import Callable

import torch
from torch import Tensor

from quicksilver.errors import ModelError
from quicksilver.quant.blocks import blocks
from quicksilver.quant.codes import MAX_CODE, TABLE_BITS, AnyPrecisionCodes, QuantGrid, centres

REACH = 2.0
"""How far, in steps of 8-bit codes, a weight may lie outside the cell that its 4-bit version chooses."""

_DAMPING = 0.01  # of the mean diagonal of the Hessian
_BLOCK = 128  # channels whose errors are passed on at once to those after them
_CELL = 16  # 8-bit codes that share a 4-bit prefix
_PREFIXES = 2**4


def quantize(
    weight: Tensor, group_size: int, hessian: Tensor | None = None, refit: bool = True, reach: float = REACH
) -> AnyPrecisionCodes:
    """Return a matrix in any-precision codes.

    Args:
        weight: [in, out], any float type.
        group_size: outputs of one group.
        hessian: [in, in] `X^T X` of the matrix's inputs on calibration text; None rounds every weight on its own.
        refit: fit the levels that the narrower prefixes stand for.
        reach: how far the 4-bit version may take a weight from where its 8-bit version belongs.

    Raises:
        ModelError: a weight that is NaN, infinite or beyond the range of float32, a Hessian that is not positive
            definite, or an unknown group size.
    """
    weight = weight.detach()
    grid = QuantGrid.fit(weight, group_size)
    codes = grid.nearest(weight) if hessian is None else _compensated(weight.float(), grid, hessian, reach)
    return AnyPrecisionCodes.pack(codes, grid, fit_tables(weight, codes, grid) if refit else None)


def fit_tables(weight: Tensor, codes: Tensor, grid: QuantGrid) -> dict[int, Tensor]:
    """Return for each of `TABLE_BITS` the best level of each prefix among codes [in, out], whole numbers [2 ** bits].

    That is its weights' mean, each by its scale squared, rounded. A whole level fits a byte, so that kernels look
    narrow codes up as bytes and multiply integers at every number of bits. It costs next to nothing: a level moves by
    half a step of 8-bit codes at most, one thirty-second of the distance between two levels of 4 bits.
    """
    counts, sums = _by_exponent(weight, codes, grid)
    squares = grid.scale_of(torch.arange(len(counts), device=counts.device)).double().square()
    total, summed = squares @ counts.double(), squares @ sums  # [16] each
    tables = {}
    for bits in TABLE_BITS:
        of_prefix = [values.view(2**bits, -1).sum(1) for values in (total, summed)]
        fitted = torch.where(of_prefix[0] > 0, of_prefix[1] / of_prefix[0], centres(bits).to(total))
        tables[bits] = fitted.round().clamp(0, MAX_CODE).float()
    return tables


def _by_exponent(weight: Tensor, codes: Tensor, grid: QuantGrid) -> tuple[Tensor, Tensor]:
    """Return how many weights there are of each exponent and 4-bit prefix, and the sums of their levels, [256, 16]."""
    size = 256 * _PREFIXES
    counts = torch.zeros(size, dtype=torch.int64, device=weight.device)
    sums = torch.zeros(size, dtype=torch.float64, device=weight.device)
    for block in blocks(weight.shape, grid.group_size):
        levels = grid.levels_in(block, weight)
        prefixes = (codes[block.inputs, block.outputs] >> 4).T.contiguous().view(levels.shape)
        places = (prefixes + block.of_groups(grid.exponents).short() * _PREFIXES).flatten()
        counts += torch.bincount(places, minlength=size)
        sums += torch.bincount(places, levels.flatten().double(), minlength=size)
    return counts.view(256, _PREFIXES), sums.view(256, _PREFIXES)


def walk_order(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return in what order channels are rounded, [in], the largest inputs first, and how errors are passed on.

    That is the upper Cholesky factor [in, in] of the inverse of the damped Hessian `X^T X`, in that order.

    Raises:
        ModelError: the Hessian is not positive definite, damped though it is.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order][:, order].double()
    damping = _DAMPING * hessian.diagonal().mean().clamp(min=1e-12)
    damped = hessian + damping * torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    return order, _cholesky(torch.cholesky_inverse(_cholesky(damped)), upper=True).float()


def _compensated(weight: Tensor, grid: QuantGrid, hessian: Tensor, reach: float) -> Tensor:
    """Return codes [in, out] whose errors make up for one another, in the 4-bit version and in the 8-bit one.

    First the leading four bits: channel by channel, those still to come make up for the error so far (Frantar et
    al. 2022, "GPTQ"). That moves weights, some into a neighbouring cell, but none further than `reach` out of it.
    Then the last four bits, by the same walk from the weights as they were, within the cells that are fixed now.
    """
    order, inverse = walk_order(hessian)
    weight, grid_in_order, middles = weight[order], grid.select(order), centres(4).to(weight.device)
    levels, lowest = grid_in_order.levels_of(weight) + 0.5, torch.empty_like(weight)

    def prefix(channel: slice, wanted: Tensor) -> Tensor:
        nearest = ((wanted + 0.5) / _CELL).floor()
        own = levels[channel]
        nearest = torch.clamp(nearest, ((own - reach) / _CELL).floor(), ((own + reach) / _CELL).floor()).clamp(0, 15)
        lowest[channel] = nearest * _CELL
        return middles[nearest.long()]

    def within_cell(channel: slice, wanted: Tensor) -> Tensor:
        return torch.clamp(wanted.round(), lowest[channel], lowest[channel] + _CELL - 1)

    _walk(weight, grid_in_order, inverse, prefix)
    codes = _walk(weight, grid_in_order, inverse, within_cell)
    return torch.empty_like(codes).index_copy_(0, order, codes).to(torch.uint8)


def _walk(weight: Tensor, grid: QuantGrid, inverse: Tensor, choose: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """Choose levels channel by channel, letting the channels to come make up for the error; return them [in, out].

    `choose` maps a channel, and the levels [1, out] that would be right for it now, to levels.
    """
    left, num_outputs = weight.clone(), weight.shape[1]
    scales, zeros = (grid.spread(values, num_outputs) for values in (grid.scales, grid.zeros.float()))
    chosen = torch.empty_like(weight)
    for start in range(0, len(left), _BLOCK):
        end = min(start + _BLOCK, len(left))
        errors = torch.empty_like(left[start:end])
        for channel in range(start, end):
            row = slice(channel, channel + 1)
            chosen[row] = choose(row, left[row] / scales[row] + zeros[row])
            error = (left[row] - scales[row] * (chosen[row] - zeros[row])) / inverse[channel, channel]
            left[channel + 1 : end] -= inverse[channel, channel + 1 : end, None] * error
            errors[channel - start] = error[0]
        left[end:] -= inverse[start:end, end:].T @ errors
    return chosen


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    factor, failed_at = torch.linalg.cholesky_ex(matrix, upper=upper)
    if int(failed_at):
        raise ModelError("its Hessian is not positive definite")
    return factor
