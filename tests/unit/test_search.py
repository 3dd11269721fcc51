"""The search over made-up figures: reproducible, resumable, stopped in time; then the choice and its verification."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from quicksilver.calibrate.pipeline import verify
from quicksilver.calibrate.scoring import Budget, saved
from quicksilver.calibrate.search import ALONE, TOGETHER, Scored, Search, eligible, pareto
from quicksilver.calibrate.trials import Trials
from quicksilver.measure.statistics import PairedDelta

BUDGET = Budget(0.2, "nll")
MECHANISMS = ("halting", "channels")
GUIDED = len(MECHANISMS) * len(ALONE) + len(TOGETHER)
NEAR = 2 * 2 + 3  # each mechanism cheaper and dearer, and both as far as it pays
COUNT = GUIDED + NEAR + 4
MANY = 10**6  # trials planned, so that the last ones, which polish, are never reached
Score = Callable[[dict[str, Any]], dict[str, Any] | None]


def row(nll: float, flops: float, upper: float | None = None, **others: Any) -> dict[str, Any]:
    """Return as much of a row of figures as a search looks at."""
    upper = nll + 0.01 if upper is None else upper
    delta = {"nll": nll, "kl": nll, "nll_ci95": [nll - 0.01, upper], "flops_reduction": flops, **others}
    return {"delta": delta, "delta_by_text": {"a text": delta}, "plan": {"hash": f"{nll} {flops}"}}


def made_up(search: Search, trials: Trials) -> Score:
    """Return figures that depend on the candidate smoothly; what loses far too much is given up."""

    def score(parameters: dict[str, Any]) -> dict[str, Any] | None:
        candidate = search.candidate(parameters, trials.finished)
        strength = sum(candidate.nats_per_work * factor for factor in candidate.factors.values())
        lost = 0.2 * strength**1.5 / max(len(candidate.factors), 1)
        return None if lost > 0.35 else row(lost, 1.0 - math.exp(-strength))

    return score


@dataclass
class Found:
    """A study's file, what came of it, and what was scored."""

    scored: list[Scored]
    parameters: list[dict[str, Any]]
    states: list[TrialState]


def search_in(
    folder: Path,
    count: int = COUNT,
    seed: int = 0,
    spoil: Callable[[int], None] = lambda _: None,
    mechanisms: Any = MECHANISMS,
    key: str = "key",
    planned: int = MANY,
) -> Found:
    """Search with made-up figures; `spoil` is called with the number of each trial before it is scored."""
    search = Search(mechanisms, BUDGET, "flops", True, planned)
    trials = Trials(folder / "study.log", key, "flops", seed)
    score = made_up(search, trials)

    def checked(parameters: dict[str, Any]) -> dict[str, Any] | None:
        spoil(len(trials.finished))
        return score(parameters)

    trials.run(search.propose, checked, count)
    finished = trials.finished
    return Found(list(search.scored(finished)), [each.params for each in finished], [each.state for each in finished])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What comes of a search that nothing interrupts."""
    return search_in(tmp_path_factory.mktemp("whole"))


def test_the_same_seed_gives_the_same_trials(whole: Found, tmp_path: Path) -> None:
    assert search_in(tmp_path, key="same") == whole
    assert len(whole.parameters) == COUNT
    other = search_in(tmp_path, seed=1, count=COUNT - 1, key="other").parameters
    assert other[: GUIDED + NEAR] == whole.parameters[: GUIDED + NEAR]
    assert all(a != b for a, b in zip(other[GUIDED + NEAR :], whole.parameters[GUIDED + NEAR :], strict=False))


def test_guided_candidates_come_first(tmp_path: Path) -> None:
    mechanisms = (*MECHANISMS, "fusion")
    n = len(mechanisms) * len(ALONE)
    found = search_in(tmp_path, count=n + 5 + 4 + 3 + 1, mechanisms=mechanisms)
    bounds = ((0, n), (n, n + 5), (n + 5, n + 12), (n + 12, n + 13))
    alone, together, near, last = (found.parameters[a:b] for a, b in bounds)
    for i, parameters in enumerate(alone):
        assert [name for name in mechanisms if parameters[f"use_{name}"]] == [mechanisms[i // len(ALONE)]]
        assert parameters["price"] == pytest.approx(ALONE[i % len(ALONE)])
    cosines = [each["fusion"] for each in alone[-len(ALONE) :]]
    assert cosines == sorted(cosines, reverse=True)
    assert [each["price"] for each in together] == pytest.approx(list(TOGETHER))
    assert all(each[f"use_{name}"] for each in together for name in mechanisms)
    (base,) = {each["price"] for each in near[:4]}
    assert TOGETHER[0] / 2 < base < TOGETHER[-1]
    steps = [(each["halting"], each["channels"]) for each in near[:4]]
    assert steps == [(0.4, 1.0), (2.5, 1.0), (1.0, 0.4), (1.0, 2.5)]  # a cosine is not stepped
    assert [each["price"] for each in near[4:6]] == pytest.approx([0.75 * base, base])
    assert 0.75 * base / 2 < near[6]["price"] <= base
    assert all(0.4 <= each[name] <= 2.5 for each in near[4:] for name in MECHANISMS)
    assert all(each[f"use_{name}"] for each in near for name in mechanisms)
    assert "level" in last[0]


def test_a_mechanism_that_saves_more_for_a_nat_gets_a_higher_price(tmp_path: Path) -> None:
    search, trials = Search(MECHANISMS, BUDGET, "flops", False, MANY), Trials(tmp_path / "study.log", "key", "flops", 0)
    worth = {"halting": 0.05, "channels": 0.2}  # saved at a strength that loses as much

    def score(parameters: dict[str, Any]) -> dict[str, Any]:
        candidate = search.candidate(parameters, trials.finished)
        strengths = {name: candidate.nats_per_work * factor for name, factor in candidate.factors.items()}
        return row(0.2 * sum(strengths.values()), sum(worth[name] * strength for name, strength in strengths.items()))

    trials.run(search.propose, score, GUIDED + NEAR)
    for each in trials.finished[-3:]:
        assert (each.params["halting"], each.params["channels"]) == pytest.approx((0.4, 1.6))


def test_the_base_price_is_where_the_budget_is_met(tmp_path: Path) -> None:
    """All mechanisms together at the price between the guided ones lose about what they may."""
    search, trials = Search(MECHANISMS, BUDGET, "flops", True, MANY), Trials(tmp_path / "study.log", "key", "flops", 0)
    score = made_up(search, trials)
    trials.run(search.propose, score, GUIDED)
    _, parameters = search.propose(trials.finished)
    assert parameters is not None
    figures = score({**parameters, "halting": 1.0, "channels": 1.0})
    assert figures is not None
    assert BUDGET.upper(figures) == pytest.approx(BUDGET.limit, rel=0.25)


@pytest.mark.parametrize(("at", "error"), [(0, RuntimeError), (GUIDED, KeyboardInterrupt), (COUNT - 3, RuntimeError)])
def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(
    whole: Found, tmp_path: Path, at: int, error: Any
) -> None:
    interruptions = [at, at, at + 2]

    def interrupt(number: int) -> None:
        if interruptions and number == interruptions[0]:
            interruptions.pop(0)
            raise error

    for _ in range(3):
        with pytest.raises(error):
            search_in(tmp_path, spoil=interrupt)
    assert search_in(tmp_path, spoil=interrupt) == whole


def test_a_line_cut_off_in_the_file_is_a_trial_not_finished(tmp_path: Path) -> None:
    """As a machine that goes down in the middle of a write leaves it."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = search_in(tmp_path / "whole", count=12)
    search_in(tmp_path / "cut", count=8)
    path = tmp_path / "cut" / "study.log"
    path.write_bytes(path.read_bytes()[:-20])
    assert search_in(tmp_path / "cut", count=12) == whole


def test_more_trials_go_on_where_fewer_ended(whole: Found, tmp_path: Path) -> None:
    search_in(tmp_path, count=10)
    scored: list[int] = []
    assert search_in(tmp_path, spoil=scored.append) == whole
    assert scored == list(range(10, COUNT))
    assert search_in(tmp_path, spoil=lambda _: pytest.fail("scored again")) == whole


def test_studies_of_other_keys_are_not_looked_at(tmp_path: Path) -> None:
    one = search_in(tmp_path, count=6, key="one")
    scored: list[int] = []
    other = search_in(tmp_path, count=6, key="other", spoil=scored.append)
    assert len(scored) == 6
    assert one == other


def test_the_last_trials_polish_the_best(tmp_path: Path) -> None:
    """Without each mechanism, then at higher prices; what is found stays inside the budget."""
    count = GUIDED + NEAR + 5 + len(MECHANISMS) + 4
    found = search_in(tmp_path, count, planned=count)
    polished = found.parameters[-len(MECHANISMS) - 4 :]
    assert all("price" in each for each in polished)
    assert all("level" in each for each in found.parameters[GUIDED + NEAR : -len(MECHANISMS) - 4])
    searched = search_in(tmp_path, count - len(polished), key="searched")
    best, before = (
        max(saved(each.row, "flops") for each in one.scored if BUDGET.holds(each.row)) for one in (found, searched)
    )
    assert best >= before


def test_hopeless_candidates_are_pruned_and_count_as_trials(tmp_path: Path) -> None:
    found = search_in(tmp_path)
    pruned = found.states.count(TrialState.PRUNED)
    assert pruned > 0
    steps = range(GUIDED, GUIDED + 2 * len(MECHANISMS))  # scored on a few windows, so no candidates
    assert [i for i, each in enumerate(found.parameters) if "rough" in each] == list(steps)
    assert len(found.scored) == COUNT - pruned - sum(found.states[i] == TrialState.COMPLETE for i in steps)
    (tmp_path / "none").mkdir()
    search, trials = (
        Search(MECHANISMS, BUDGET, "flops", False, MANY),
        Trials(tmp_path / "none" / "study.log", "k", "flops", 0),
    )
    trials.run(search.propose, lambda _: None, GUIDED + NEAR + 2)  # all of them
    assert {each.state for each in trials.finished} == {TrialState.PRUNED}
    assert list(search.scored(trials.finished)) == []


def test_the_time_limit_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("quicksilver.calibrate.trials.time", SimpleNamespace(monotonic=lambda: clock[0]))
    search, trials = Search(MECHANISMS, BUDGET, "flops", True, MANY), Trials(tmp_path / "study.log", "key", "flops", 0)
    counted: list[None] = []

    def slow(parameters: dict[str, Any]) -> dict[str, Any]:
        clock[0] += 2.0
        return row(0.1, 0.1)

    trials.run(search.propose, slow, 1000, 109.0, lambda: counted.append(None))
    assert len(trials.finished) == len(counted) == 5
    trials.run(search.propose, slow, 1000, 109.0)
    assert len(trials.finished) == len(counted)


def test_a_switch_is_not_tried_alone_nor_at_prices(tmp_path: Path) -> None:
    mechanisms = (*MECHANISMS, "entries")
    found = search_in(tmp_path, count=GUIDED + NEAR + 2, mechanisms=mechanisms)
    assert not any("entries" in each for each in found.parameters)
    alone, near = found.parameters[: len(MECHANISMS) * len(ALONE)], found.parameters[GUIDED : GUIDED + NEAR]
    assert not any(each["use_entries"] for each in alone)
    assert all(each["use_entries"] for each in near)
    assert all(
        "entries" in each.candidate.factors
        for each in found.scored
        if each.candidate and each.candidate.nats_per_work == 0.05
    )


def test_what_is_always_on_is_so_in_candidates_of_several_mechanisms(tmp_path: Path) -> None:
    search = Search(MECHANISMS, BUDGET, "flops", True, MANY, always=("entries",))
    trials = Trials(tmp_path / "study.log", "key", "flops", 0)
    score = made_up(search, trials)
    trials.run(search.propose, score, COUNT)
    for each in search.scored(trials.finished):
        assert each.candidate is not None
        assert ("entries" in each.candidate.factors) == (set(MECHANISMS) <= set(each.candidate.factors))


@pytest.mark.parametrize("mechanisms", [("halting",), ("fusion",), ("channels",), ("skipping", "fusion")])
def test_few_mechanisms_are_searched_too(tmp_path: Path, mechanisms: Any) -> None:
    count = 4 * len(mechanisms) + 2
    found = search_in(tmp_path, count=count, mechanisms=mechanisms)
    assert len(found.parameters) == count
    for each in found.scored:
        assert each.candidate is not None
        assert set(each.candidate.factors) <= set(mechanisms)
        assert each.group == (next(iter(each.candidate.factors)) if len(each.candidate.factors) == 1 else "together")
        assert ("fill" in found.parameters[0]) == ("halting" in mechanisms)


def of(*figures: tuple[float, float]) -> list[Scored]:
    return [Scored(str(i), row(nll, flops)) for i, (nll, flops) in enumerate(figures)]


def names(candidates: list[Scored]) -> list[str]:
    return [each.group for each in candidates]


def test_the_frontier_is_what_no_other_beats_in_both() -> None:
    candidates = of((0.1, 0.2), (0.3, 0.5), (0.2, 0.2), (0.05, 0.1), (0.3, 0.4), (0.0, -0.1), (0.15, 0.1))
    assert names(pareto(candidates, "flops", BUDGET)) == ["1", "0", "3", "5"]
    assert names(pareto(of((0.1, 0.2), (0.1, 0.2)), "flops", BUDGET)) == ["0"]
    assert pareto([], "flops", BUDGET) == []


def test_the_frontier_looks_at_the_upper_end_and_leaves_out_what_has_none() -> None:
    vague = Scored("vague", row(0.0, 0.3, upper=0.15))
    sure = Scored("sure", row(0.1, 0.2, upper=0.11))
    delta = {"nll": 0.0, "nll_ci95": None, "flops_reduction": 0.9}
    single = Scored("single", {"delta": delta, "delta_by_text": {"a text": delta}})
    nan = Scored("nan", row(float("nan"), 0.95))
    assert names(pareto([single, sure, vague, nan], "flops", BUDGET)) == ["vague", "sure"]


def test_what_saves_nothing_or_loses_too_much_is_not_eligible() -> None:
    candidates = of((0.1, 0.2), (0.195, 0.5), (0.05, 0.1), (-0.1, 0.0), (0.18, 0.4))
    assert names(eligible(candidates, "flops", BUDGET)) == ["4", "0", "2"]  # 1 would hold but for its interval


@pytest.mark.parametrize(("unit", "upper"), [("nll", 0.3), ("ppl", 5.0)])
def test_budgets_hold_for_the_upper_end(unit: str, upper: float) -> None:
    worse = {"nll": 0.2, "nll_ci95": [0.1, 0.3], "ppl": 4.0, "ppl_ci95": [2.0, 5.0]}
    better = {"nll": 0.1, "nll_ci95": [0.0, 0.2], "ppl": 2.0, "ppl_ci95": [0.0, 3.0]}
    figures = {"delta": better, "delta_by_text": {"one": better, "two": worse}}
    assert Budget(1.0, unit).upper(figures) == upper
    assert Budget(upper, unit).holds(figures)
    assert not Budget(upper - 1e-6, unit).holds(figures)
    one = {"delta_by_text": {"one": better, "two": {"nll_ci95": None, "ppl_ci95": None}}}
    assert Budget(1e9, unit).upper(one) == math.inf
    assert not Budget(1e9, unit).holds(one)


def test_a_budget_of_perplexity_is_one_of_nats() -> None:
    assert Budget(0.01, "nll").nats(3.0) == 0.01
    assert math.exp(3.0 + Budget(0.2, "ppl").nats(3.0)) == pytest.approx(math.exp(3.0) + 0.2)


def test_hopeless_is_what_is_sure_to_lose_twice_the_limit() -> None:
    delta = PairedDelta(4.0, (2.0, 5.0), 0.2, (0.1, 0.3))
    assert not Budget(0.05, "nll").is_hopeless(delta)
    assert Budget(0.049, "nll").is_hopeless(delta)
    assert not Budget(1.0, "ppl").is_hopeless(delta)
    assert Budget(0.9, "ppl").is_hopeless(delta)
    assert not Budget(1e-9, "nll").is_hopeless(PairedDelta(4.0, None, 0.2, None))


def test_what_is_saved_is_what_was_asked_for() -> None:
    delta = {
        "flops_reduction": 0.1,
        "bitops_reduction": 0.9,
        "bitops_reduction_8bit": 0.2,
        "weight_bytes_reduction": 0.9,
        "weight_bytes_reduction_8bit": 0.3,
        "kv_bytes_reduction": 0.9,
        "kv_used_bytes_reduction": 0.4,
        "speedup": 2.0,
    }
    objectives = ("flops", "bitops", "weight_bytes", "kv_bytes", "seconds")
    assert [saved({"delta": delta}, each) for each in objectives] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_verification_backs_off_in_order() -> None:
    candidates, tried = of((0.18, 0.4), (0.1, 0.2), (0.05, 0.1)), []

    def held_out(candidate: Scored) -> dict[str, Any]:
        tried.append(candidate.group)
        return row(0.3 if candidate.group == "0" else 0.15, 0.3)

    verified = verify(candidates, BUDGET, held_out)
    assert tried == ["0", "1"]  # the first to hold ends it
    assert verified.chosen is candidates[1]
    assert verified.row == row(0.15, 0.3)
    assert [(each.group, figures["delta"]["nll"]) for each, figures in verified.failed] == [("0", 0.3)]


def test_nothing_is_chosen_where_nothing_holds() -> None:
    candidates = of((0.1, 0.2), (0.05, 0.1))
    verified = verify(candidates, BUDGET, lambda _: row(0.5, 0.2))
    assert (verified.chosen, verified.row) == (None, None)
    assert [each.group for each, _ in verified.failed] == ["0", "1"]
    assert verify([], BUDGET, lambda _: row(0.0, 0.2)).chosen is None
