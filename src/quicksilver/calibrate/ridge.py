"""Ridge regression from sums over rows: one pass over the text, memory that does not grow with it."""

from typing import NamedTuple

import torch
from torch import Tensor

from quicksilver.errors import ModelError

PENALTY = 1e-3
"""Of the mean of the inputs' second moments; the constant is not penalised (Hoerl and Kennard 1970)."""

_SHARE_KEPT = 0.995  # of the fitted outputs' power, by a map of low rank


class Affine(NamedTuple):
    """A fitted map `x @ weight + bias`: weight [in, out], bias [out], float64."""

    weight: Tensor
    bias: Tensor


class RidgeSums:
    """Second moments of rows of inputs and outputs, which may be on any device."""

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros((num_inputs + 1, num_inputs + 1), dtype=torch.float64, device=device)
        self.cross = torch.zeros((num_inputs + 1, num_outputs), dtype=torch.float64, device=device)
        self.power = 0.0

    @property
    def num_rows(self) -> int:
        return int(self.gram[-1, -1])

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows of inputs [N, in] and of outputs [N, out]."""
        ones = x.new_ones((len(x), 1))
        inputs = torch.cat((x, ones), dim=1).float()
        self.gram += inputs.T @ inputs
        self.cross += inputs.T @ y.float()
        self.power += float(y.double().square().sum())

    def solve(self, name: str) -> Affine:
        """Return the map of least penalised squared error; ModelError where the sums are not finite, or empty."""
        if not self.num_rows or not bool(torch.isfinite(self.gram).all() and torch.isfinite(self.cross).all()):
            raise ModelError(
                f"{name}: the model's states are NaN or infinite on the calibration text, or there are none"
            )
        penalty = torch.full_like(self.gram[0], PENALTY) * self.gram.diagonal()[:-1].mean()
        penalty[-1] = 0.0
        solution = torch.linalg.solve(self.gram + torch.diag(penalty), self.cross)
        return Affine(solution[:-1], solution[-1])

    def error(self, fitted: Affine) -> float:
        """Return a map's squared error over the rows, as a share of the outputs' power."""
        whole = torch.cat((fitted.weight, fitted.bias[None]))
        lost = self.power - 2 * float((whole * self.cross).sum()) + float((whole * (self.gram @ whole)).sum())
        return max(lost, 0.0) / max(self.power, 1e-30)

    def factors(self, fitted: Affine) -> tuple[Tensor, ...]:
        """Return a map's weight as one matrix, or as two of low rank where that is less work and loses nearly nothing.

        The best map of a rank is the full one, projected on the directions in which its outputs have most power
        (reduced-rank regression; Izenman 1975).
        """
        size = min(fitted.weight.shape)
        outputs = fitted.weight.T @ self.gram[:-1, :-1] @ fitted.weight
        powers, directions = torch.linalg.eigh(outputs)
        kept = powers.clamp(min=0.0).flip(0).cumsum(0) >= _SHARE_KEPT * powers.clamp(min=0.0).sum()
        rank = int(kept.nonzero()[0]) + 1 if bool(kept.any()) else size
        if 2 * rank >= size:
            return (fitted.weight,)
        top = directions[:, -rank:]
        return fitted.weight @ top, top.T


def named_tensors(name: str, weights: tuple[Tensor, ...], bias: Tensor) -> dict[str, Tensor]:
    """Return a map's tensors under the names by which a plan knows them."""
    keys = ("weight",) if len(weights) == 1 else ("down", "up")
    return {f"{name}.{key}": weight for key, weight in zip(keys, weights, strict=True)} | {f"{name}.bias": bias}
