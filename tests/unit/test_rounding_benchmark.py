"""What the rounding benchmark compares: formulas on every code, errors within their bounds, weights that stay."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import rounding
from quicksilver.weights.codes import GROUP_SIZES
from tests import tiny

ALL_CODES = torch.arange(256, dtype=torch.uint8)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(1, 9))
def test_rounded_slices_follow_the_formula_on_every_code(bits: int) -> None:
    cell = 2 ** (8 - bits)
    expected = [min(int(code / cell + 0.5), 2**bits - 1) * cell for code in range(256)]
    assert rounding.rounded_slices(ALL_CODES, bits).tolist() == expected


def test_rounded_slices_are_no_prefixes() -> None:
    assert rounding.rounded_slices(torch.tensor([53], dtype=torch.uint8), 2).item() == 64  # 53 begins with 00
    assert rounding.lower_edges(torch.tensor([53], dtype=torch.uint8), 2).item() == 0


@pytest.mark.parametrize("bits", rounding.NARROW)
def test_lower_edges_lie_below_the_middles(bits: int) -> None:
    weight, hessian = matrix(9, 70), torch.eye(70)
    read = {method.name: method.read(weight, 32, hessian)[bits] for method in rounding.METHODS}
    lower, middle = read["truncated, lower edge"], read[rounding.MIDDLE]
    assert (lower < middle).all()
    assert (middle - weight).square().sum() < (lower - weight).square().sum()


@pytest.mark.parametrize("bits", rounding.BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_plain_levels_are_within_half_a_step(bits: int, group_size: int) -> None:
    weight = matrix(5, 150)
    weight[0], weight[1] = 0.0, weight[1].abs() + 1.0  # nothing to tell; zero outside of the range
    told = rounding.plain(weight, group_size, bits)
    for part, got in zip(weight.split(group_size, 1), told.split(group_size, 1), strict=True):
        step = (part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / (2**bits - 1)
        assert ((got - part).abs() <= step[:, None] * 0.5001).all()
        assert all(len(row.unique()) <= 2**bits for row in got)


def test_groups_lie_along_inputs_or_outputs() -> None:
    by_inputs, by_outputs, *_ = rounding.METHODS
    weight, hessian = matrix(32, 32), torch.eye(32)
    assert torch.equal(by_inputs.read(weight, 32, hessian)[4], by_outputs.read(weight.T, 32, hessian)[4].T)
    weight[3] = 100.0  # an output apart spoils the groups that hold it
    assert by_inputs.read(weight, 32, hessian)[4][:3].unique().numel() > 16
    assert by_outputs.read(weight, 32, hessian)[2][:3].abs().max() == 0.0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_copies_are_filled_and_the_model_stays(family: str) -> None:
    model = tiny.model(family)
    before = copy.deepcopy(model.state_dict())
    copies = {bits: copy.deepcopy(model) for bits in rounding.BITS}
    hessians = {name: torch.eye(weight.shape[1]) for name, weight in rounding.matrices(model)}
    stored = rounding.fill(copies, model, rounding.METHODS[0], 32, hessians)
    assert set(stored) == set(rounding.BITS)
    assert stored[2] < stored[4] < stored[8]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for bits, each in copies.items():
        for (_, weight), (_, told) in zip(rounding.matrices(model), rounding.matrices(each), strict=True):
            assert torch.equal(told, rounding.plain(weight, 32, bits))
    others = {name for name, value in copies[8].state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in before if "norm" in name or "ln_" in name or "embed" in name or "wte" in name} <= others


def test_bits_stored_count_scales_and_gains() -> None:
    stored = {method.name: method.stored((64, 96), 32, 4) / (64 * 96) for method in rounding.METHODS}
    assert stored[rounding.PLAIN[0]] == stored[rounding.PLAIN[1]] == pytest.approx(4 + 20 / 32)
    assert stored[rounding.HELD] == stored[rounding.MIDDLE] == pytest.approx(8.5 + 16 / 96)


def test_verdicts_hold_the_library_to_the_better_plain_row() -> None:
    def row(method: str, bits: int, nll: float) -> dict:
        return {"method": method, "bits": bits, "group_size": 64, "delta": {"nll": nll}}

    plain = [row(rounding.PLAIN[0], 4, 0.05), row(rounding.PLAIN[1], 4, 0.04)]
    met = rounding.verdict([*plain, row(rounding.HELD, 8, 0.002), row(rounding.HELD, 4, 0.04)], 64)
    assert met.count("met") == 2
    missed = rounding.verdict([*plain, row(rounding.HELD, 8, 0.003), row(rounding.HELD, 4, 0.045)], 64)
    assert missed.count("MISSED") == 2
