"""Ridge regression from sums: the penalised least squares it claims to be, whole or in pieces, full or of low rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quicksilver.calibrate.ridge import PENALTY, Affine, RidgeSums, named_tensors
from quicksilver.errors import ModelError
from quicksilver.plan.affine import AffineMap
from tests import tolerances

CPU = torch.device("cpu")
ROWS, INPUTS, OUTPUTS = 400, 12, 12
CLOSE = tolerances.RIDGE


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(rank: int = OUTPUTS, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return inputs, none of them centred, and outputs of an affine map of a rank, with noise."""
    x = draw(0, ROWS, INPUTS) * torch.linspace(0.3, 2.0, INPUTS) + 0.7
    y = x @ draw(1, INPUTS, rank) @ draw(2, rank, OUTPUTS) + draw(3, OUTPUTS) + noise * draw(4, ROWS, OUTPUTS)
    return x, y


def sums_of(*pieces: tuple[Tensor, Tensor]) -> RidgeSums:
    sums = RidgeSums(INPUTS, OUTPUTS, CPU)
    for x, y in pieces:
        sums.add(x, y)
    return sums


def direct(x: Tensor, y: Tensor) -> Affine:
    """Solve the least squares of rows and penalty rows, which are not squared: no sums at all."""
    x, y = x.double(), y.double()
    scale = (PENALTY * x.square().sum(0).mean()).sqrt()
    whole = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), dim=1)
    penalty = torch.cat((scale * torch.eye(INPUTS, dtype=torch.float64), torch.zeros(INPUTS, 1)), dim=1)
    targets = torch.cat((y, torch.zeros(INPUTS, OUTPUTS, dtype=torch.float64)))
    solution = torch.linalg.lstsq(torch.cat((whole, penalty)), targets).solution
    return Affine(solution[:-1], solution[-1])


def test_it_is_the_penalised_least_squares() -> None:
    x, y = rows()
    fitted, wanted = sums_of((x, y)).solve("layer 0"), direct(x, y)
    assert fitted.weight.dtype == torch.float64
    torch.testing.assert_close(fitted.weight, wanted.weight, atol=CLOSE, rtol=0.0)
    torch.testing.assert_close(fitted.bias, wanted.bias, atol=CLOSE, rtol=0.0)


def test_the_constant_is_not_penalised() -> None:
    """Outputs that do not depend on the inputs are met by the constant alone, however large they are."""
    x, _ = rows()
    fitted = sums_of((x, torch.full((ROWS, OUTPUTS), 100.0))).solve("layer 0")
    assert float(fitted.weight.abs().max()) < 1e-3
    torch.testing.assert_close(
        fitted.bias, torch.full_like(fitted.bias, 100.0), atol=0.0, rtol=tolerances.RIDGE_CONSTANT
    )


def test_pieces_give_what_the_whole_gives() -> None:
    x, y = rows()
    pieces = sums_of(*zip(x.split([1, 0, 250, 149]), y.split([1, 0, 250, 149]), strict=True))
    whole = sums_of((x, y))
    assert pieces.num_rows == whole.num_rows == ROWS
    torch.testing.assert_close(pieces.solve("a"), whole.solve("b"), atol=CLOSE, rtol=0.0)
    assert pieces.error(pieces.solve("a")) == pytest.approx(whole.error(whole.solve("b")), abs=1e-6)


def test_its_error_is_the_share_of_the_outputs_power_that_it_misses() -> None:
    x, y = rows(noise=2.0)
    sums = sums_of((x, y))
    other = Affine(draw(7, INPUTS, OUTPUTS).double(), draw(8, OUTPUTS).double())
    for fitted in (sums.solve("layer 0"), other):
        missed = y.double() - x.double() @ fitted.weight - fitted.bias
        share = float(missed.square().sum() / y.double().square().sum())
        assert sums.error(fitted) == pytest.approx(share, rel=1e-4)
    assert sums.error(sums.solve("layer 0")) < sums.error(other)


def test_a_map_of_full_rank_stays_one_matrix() -> None:
    x, y = rows()
    sums = sums_of((x, y))
    fitted = sums.solve("layer 0")
    (weight,) = sums.factors(fitted)
    assert torch.equal(weight, fitted.weight)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_map_of_low_rank_becomes_two_matrices(rank: int) -> None:
    x, y = rows(rank, noise=0.0)
    sums = sums_of((x, y))
    fitted = sums.solve("layer 0")
    factors = sums.factors(fitted)
    down, up = factors
    assert down.shape[1] == up.shape[0] <= rank
    assert (down.shape[0], up.shape[1]) == (INPUTS, OUTPUTS)
    full, short = x.double() @ fitted.weight, x.double() @ down @ up
    lost = float((full - short).square().sum() / full.square().sum())
    assert lost < 0.006  # a bit more than the share that is given away
    named = {key: tensor.float() for key, tensor in named_tensors("output.0", factors, fitted.bias).items()}
    assert set(named) == {"output.0.down", "output.0.up", "output.0.bias"}
    applied = AffineMap.named(named, "output.0", INPUTS)(x)
    torch.testing.assert_close(applied.double(), short + fitted.bias, atol=tolerances.MAPPED, rtol=tolerances.MAPPED)


def test_outputs_that_are_nothing_have_a_map_that_is_nothing() -> None:
    x, _ = rows()
    sums = sums_of((x, torch.zeros(ROWS, OUTPUTS)))
    fitted = sums.solve("layer 0")
    assert sums.error(fitted) == 0.0
    assert all(bool(factor.isfinite().all()) for factor in sums.factors(fitted))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused(value: float) -> None:
    for spoilt in range(2):
        pieces = [part.clone() for part in rows()]
        pieces[spoilt][3, 5] = value
        with pytest.raises(ModelError, match="layer 7: the model's states are NaN or infinite"):
            sums_of((pieces[0], pieces[1])).solve("layer 7")


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(ModelError, match=r"layer 7: .* or there are none"):
        sums_of().solve("layer 7")
