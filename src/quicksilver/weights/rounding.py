"""Choosing codes for a matrix: the nearest levels, or levels that make up for one another's errors.

What is rounded is [out, in]. Everything is computed in tiles of it: what is computed of one stays in the processor's
cache, and temporaries as large as the matrix would cost more time, in pages that the system must give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.core.bits import MAX_BITS
from quicksilver.errors import ModelError
from quicksilver.weights.codes import BLOCK, GroupedCodes, Scales, check_group_size

REACH = 2.0
"""How far, in steps of 8-bit codes, a weight may lie outside the cell that its 4-bit version chooses."""

_SHRINKS = (0.0, 0.01, 0.02, 0.03)
"""Shares of a group's range by which its outermost 4-bit levels are drawn in, each end on its own.

At all of these, 8-bit codes reach both ends: a cell's outermost code is half a cell beyond its middle.
"""

_CELL = 16  # 8-bit codes that share a 4-bit prefix
_MIDDLE = (_CELL - 1) / 2  # of a cell, what the 4-bit version is read as
_MAX_CODE = 2**MAX_BITS - 1
_COARSE = 240  # 8-bit steps between the middles of the outermost cells
_MAX_STEP = 255  # of the small whole numbers that are a group's step
_USUAL = -9  # the largest step of 256 inputs is below 2 ** -9 in models, and above 2 ** -25
_TILE_OUTPUTS = 256
_WALK_OUTPUTS = 4096  # walked at a time
_WALK_INPUTS = 128  # whose errors are passed on at once to those after them
_DAMPING = 0.01  # of the mean diagonal of the Hessian
_TINY = torch.finfo(torch.float32).tiny


def quantize(weight: Tensor, group_size: int, hessian: Tensor | None = None, reach: float = REACH) -> GroupedCodes:
    """Return a matrix in codes of 8 bits, whose leading four are chosen as carefully as all.

    A group's step is a whole number up to 255 times a half-precision step of 256 inputs; its zero is a code, so that
    weights of 0 stay 0 at 8 bits.

    Args:
        weight: [out, in], any float type.
        group_size: inputs of one group.
        hessian: [in, in] `X^T X` of the matrix's inputs on calibration text; None rounds every weight on its own.
        reach: how far the 4-bit version may take a weight from where its 8-bit version belongs.

    Raises:
        ModelError: a weight that is NaN, infinite or beyond the range of float32, a Hessian that is not positive
            definite, or an unknown group size.
    """
    check_group_size(group_size)
    weight = weight.detach()
    factor, importance = _factor_of(weight), None
    if hessian is not None:
        importance = hessian.diagonal().float() / hessian.diagonal().amax().clamp(min=_TINY)
    (num_outputs, num_inputs), device = weight.shape, weight.device
    groups, blocks = -(-num_inputs // group_size), -(-num_inputs // BLOCK)
    steps, zeros = (torch.empty((num_outputs, groups), dtype=torch.uint8, device=device) for _ in range(2))
    block_steps = torch.empty((num_outputs, blocks), dtype=torch.float16, device=device)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=device)
    for tile in _tiles(num_outputs, num_inputs, group_size):
        values = tile.of(weight)
        grid = _fit(values, factor, None if importance is None else tile.of_inputs(importance))
        steps[tile.groups], zeros[tile.groups] = grid.steps.T, grid.zeros.T
        block_steps[tile.block] = grid.block_steps
        if hessian is None:
            nearest = values.div_(grid.scale[:, None]).round_().add_(grid.zeros[:, None]).clamp_(0, _MAX_CODE)
            codes[tile.weights] = nearest.flatten(0, 1)[: tile.num_inputs].T.to(torch.uint8)
    scales = Scales(steps, zero=zeros, block_steps=block_steps, factor=factor)
    if hessian is not None:
        order, inverse = walk_order(hessian)
        for rows in torch.arange(num_outputs, device=device).split(_WALK_OUTPUTS):
            walk = _Walk.of(weight[rows], scales.rows(rows), group_size, order, inverse)
            codes[rows] = walk.compensated(reach)
    return GroupedCodes(codes, MAX_BITS, group_size, scales)


def outline_of(weight: Tensor, group_size: int) -> GroupedCodes:
    """Return what `quantize` gives for a matrix [out, in], without content, on "meta"."""
    num_outputs, num_inputs = weight.shape
    groups, blocks = -(-num_inputs // group_size), -(-num_inputs // BLOCK)
    codes, steps, zeros = (
        torch.empty((num_outputs, width), dtype=torch.uint8, device="meta") for width in (num_inputs, groups, groups)
    )
    block_steps = torch.empty((num_outputs, blocks), dtype=torch.float16, device="meta")
    return GroupedCodes(codes, MAX_BITS, group_size, Scales(steps, zero=zeros, block_steps=block_steps))


def _factor_of(weight: Tensor) -> float:
    """Return the power of two that steps are kept without.

    Half precision is precise from 2 ** -14 on alone, and a step of 256 inputs, their range by 240 * 255, is less than
    that in every model. Without this power the largest one is from 2 ** -2 up to 2 ** 14, so that those of inputs that
    are a thousandth as large are precise still. Powers are 2 ** 16 apart: matrices of one layer, whose ranges are from
    0.002 to 128, have the same one, and can be joined.
    """
    if weight.numel() == 0:
        return 1.0
    low, high = torch.stack(weight.aminmax()).double().tolist()
    if not math.isfinite(low) or not math.isfinite(high) or max(-low, high) > torch.finfo(torch.float32).max:
        raise ModelError("it holds NaN or infinite values")
    widest = max(high, 0.0) - min(low, 0.0)
    if widest > torch.finfo(torch.float32).max:
        raise ModelError("a group of its values spans more than the range of float32")
    exponent = math.frexp(widest / _COARSE / _MAX_STEP)[1] if widest else _USUAL
    return 2.0 ** max(_USUAL - 14 + 16 * math.ceil((exponent - _USUAL) / 16), -100)


class _Tile(NamedTuple):
    """Some outputs of a matrix, and 256 inputs or what is left of them."""

    weights: tuple[slice, slice]  # where it lies in a matrix [out, in]
    groups: tuple[slice, slice]  # in what there is of each group, [out, groups]
    block: tuple[slice, int]  # in what there is of 256 inputs, [out, blocks]
    group_size: int

    @property
    def num_inputs(self) -> int:
        return self.weights[1].stop - self.weights[1].start

    def of(self, matrix: Tensor) -> Tensor:
        """Return what it is of a matrix, [groups, size, out] contiguous float32; the last input fills its group."""
        part = matrix[self.weights].T
        copied = torch.empty(part.shape, dtype=torch.float32, device=part.device).copy_(part)
        missing = -self.num_inputs % self.group_size
        whole = torch.cat((copied, copied[-1:].expand(missing, -1))) if missing else copied
        return whole.unflatten(0, (-1, self.group_size))

    def of_inputs(self, values: Tensor) -> Tensor:
        """Return what it is of values [in], [groups, size, 1]; 0 fills the last group."""
        part = values[self.weights[1]]
        return F.pad(part, (0, -len(part) % self.group_size)).view(-1, self.group_size, 1)


def _tiles(num_outputs: int, num_inputs: int, group_size: int) -> Iterator[_Tile]:
    for begin in range(0, num_outputs, _TILE_OUTPUTS):
        outputs = slice(begin, min(begin + _TILE_OUTPUTS, num_outputs))
        for first in range(0, num_inputs, BLOCK):
            inputs = slice(first, min(first + BLOCK, num_inputs))
            groups = slice(first // group_size, -(-inputs.stop // group_size))
            yield _Tile((outputs, inputs), (outputs, groups), (outputs, first // BLOCK), group_size)


class _Grid(NamedTuple):
    """Where a tile's levels lie."""

    steps: Tensor  # [groups, out] whole numbers up to 255, float32
    block_steps: Tensor  # [out] float16
    zeros: Tensor  # [groups, out] codes of zero, float32
    scale: Tensor  # [groups, out] float32, distances between two levels, 1 where a group is all zero


def _fit(values: Tensor, factor: float, importance: Tensor | None) -> _Grid:
    """Return the levels of a tile [groups, size, out] whose 4-bit version has the least squared error.

    `importance`: [groups, size, 1], what an error of each input counts; None counts all alike.
    """
    low, high = values.amin(1).clamp_(max=0.0), values.amax(1).clamp_(min=0.0)  # zero is always a level
    width = high - low
    lower, upper = _search((values - low[:, None]).div_(width.clamp(min=_TINY)[:, None]), importance)
    wanted = width * (1 - lower - upper) / _COARSE  # [groups, out]
    needed = wanted.amax(0) / _MAX_STEP / factor
    block_steps = _half_above(needed)
    unit = (block_steps.float() * factor).clamp(min=_TINY)
    quotients = wanted / unit
    steps = quotients.round()
    beyond = (width - lower * width) / unit > (_MAX_CODE + 1 - _MIDDLE) * steps  # by a step: the greatest 8-bit level
    steps = torch.where(beyond, quotients.ceil(), steps).clamp_(0, _MAX_STEP)
    scale = torch.where(steps > 0, steps * unit, 1.0)
    zeros = (_MIDDLE - (low + lower * width) / scale).round_().clamp_(0, _MAX_CODE)
    return _Grid(steps, block_steps, zeros, scale)


def _search(places: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return by how much of a group's range its least and greatest 4-bit level are drawn in, [groups, out] each.

    `places`: [groups, size, out], where weights lie in the range of their group, from 0 to 1.
    """
    best = torch.full_like(places[:, 0], torch.inf)
    lower, upper, told = torch.zeros_like(best), torch.zeros_like(best), torch.empty_like(places)
    for a in _SHRINKS:
        for b in _SHRINKS:
            cell = (1 - a - b) / 15
            torch.sub(places, a - cell / 2, out=told).div_(cell).floor_().clamp_(0, 15)
            squares = told.mul_(cell).add_(a).sub_(places).square_()
            error = (squares if importance is None else squares.mul_(importance)).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            lower, upper = lower.masked_fill_(better, a), upper.masked_fill_(better, b)
    return lower, upper


def _half_above(values: Tensor) -> Tensor:
    """Return float16 that are not below values, none of them below 0, so that the greatest step still fits."""
    half = values.half()
    return torch.where(half.float() < values, (half.view(torch.int16) + 1).view(torch.float16), half)


def walk_order(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return in what order inputs are rounded, [in], the largest first, and how errors are passed on.

    That is the upper Cholesky factor [in, in] of the inverse of the damped Hessian `X^T X`, in that order.

    Raises:
        ModelError: the Hessian is not positive definite, damped though it is.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order][:, order].double()
    damping = _DAMPING * hessian.diagonal().mean().clamp(min=1e-12)
    damped = hessian + damping * torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    return order, _cholesky(torch.cholesky_inverse(_cholesky(damped)), upper=True).float()


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    factor, failed_at = torch.linalg.cholesky_ex(matrix, upper=upper)
    if int(failed_at):
        raise ModelError("its Hessian is not positive definite")
    return factor


class _Walk(NamedTuple):
    """Some outputs of a matrix, their inputs in the order in which they are rounded; all [in, out] float32."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor  # [in]
    inverse: Tensor  # [in, in], as `walk_order` gives it

    @classmethod
    def of(cls, weight: Tensor, scales: Scales, group_size: int, order: Tensor, inverse: Tensor) -> _Walk:
        """Return the walk of outputs [n, in]."""
        scale, _ = scales.expand(group_size)
        assert isinstance(scales.zero, Tensor)
        group_of = order // group_size
        scale, zero = (values.T[group_of].contiguous() for values in (scale, scales.zero.float()))
        return cls(weight.T[order].float(), scale.masked_fill_(scale == 0, 1.0), zero, order, inverse)

    def compensated(self, reach: float) -> Tensor:
        """Return codes [n, in] whose errors make up for one another, in the 4-bit version and in the 8-bit one.

        First the leading four bits: input by input, those still to come make up for the error so far (Frantar et
        al. 2022, "GPTQ"). That moves weights, some into a neighbouring cell, but none further than `reach` out of it.
        Then the last four bits, by the same walk from the weights as they were, within the cells that are fixed now.
        """
        own = self.weight / self.scale + (self.zero + 0.5)
        least, most = ((own - reach) / _CELL).floor_(), own.add_(reach).div_(_CELL).floor_()
        lowest = least  # of each input's cell, its first code, in the place of what is not needed again

        def prefix(i: int, wanted: Tensor) -> Tensor:
            cell = ((wanted + 0.5) / _CELL).floor().maximum(least[i]).minimum(most[i]).clamp_(0, 15)
            lowest[i] = cell * _CELL
            return lowest[i] + _MIDDLE

        def within_cell(i: int, wanted: Tensor) -> Tensor:
            return wanted.round().maximum(lowest[i]).minimum(lowest[i] + (_CELL - 1))

        self._choose(prefix)
        codes = self._choose(within_cell).to(torch.uint8)
        return torch.empty_like(codes).index_copy_(0, self.order, codes).T

    def _choose(self, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Choose levels input by input, letting the inputs to come make up for the error; return them [in, out].

        `choose` maps an input, and the levels [out] that would be right for it now, to levels.
        """
        left, chosen = self.weight.clone(), torch.empty_like(self.weight)
        scale, zero, inverse = self.scale, self.zero, self.inverse
        for start in range(0, len(left), _WALK_INPUTS):
            end = min(start + _WALK_INPUTS, len(left))
            errors = torch.empty_like(left[start:end])
            for i in range(start, end):
                chosen[i] = choose(i, left[i] / scale[i] + zero[i])
                errors[i - start] = (left[i] - scale[i] * (chosen[i] - zero[i])) / inverse[i, i]
                left[i + 1 : end] -= inverse[i, i + 1 : end, None] * errors[i - start]
            left[end:] -= inverse[start:end, end:].T @ errors
        return chosen
