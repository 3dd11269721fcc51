"""Calibration from end to end: fit, search, choose, verify; what is found is kept in a folder as it is found."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quicksilver.calibrate import data_file, fitting
from quicksilver.calibrate.candidates import FILLS, CalibrationData, Candidate, build, static_exit
from quicksilver.calibrate.mechanisms import Mechanism
from quicksilver.calibrate.objectives import Objective, unit_costs
from quicksilver.calibrate.paper import PaperSearch
from quicksilver.calibrate.scoring import Budget, Scorer
from quicksilver.calibrate.search import ROUGH, Scored, Search, eligible
from quicksilver.calibrate.splits import Split
from quicksilver.calibrate.trials import Trials
from quicksilver.core.files import write_atomically
from quicksilver.measure.windows import WindowConfig
from quicksilver.model import QuickSilverForCausalLM
from quicksilver.plan import Plan
from quicksilver.weights.linear import keeping_expanded

_PAPER_TRIALS = 10
_FREE = 0.05  # share of the budget that coded entries may cost and be taken though the objective does not gain by them
_ROUGH_STEP = 4  # of the searched windows every fourth is enough to see which way to step
_EXITS_TO = 4.0  # times the budget: deeper exits that lose more are not looked for


@dataclass(frozen=True)
class Settings:
    """What is asked for."""

    budget: Budget  # what may be lost
    objective: Objective  # what is to be saved
    mechanisms: tuple[Mechanism, ...]  # that may be used
    fills: bool  # whether what a halted token leaves in deeper layers is to be chosen too
    trials: int  # of the search
    # seconds after which the search stops, None for none; fitting and verifying are not counted
    time_limit: float | None
    seed: int  # of the search

    @property
    def bits(self) -> tuple[int, ...]:
        return (8, 6, 4, 2, 0) if self.objective in ("bitops", "weight_bytes") else (8, 0)


@dataclass(frozen=True)
class Verified:
    """What came of verification."""

    chosen: Scored | None  # the candidate that held, None where none did
    row: dict[str, Any] | None  # its figures on the held-out text
    # candidates that did not hold there, with their figures, in the order in which they were tried
    failed: list[tuple[Scored, dict[str, Any]]]


@dataclass(frozen=True)
class Calibration:
    """What came of it."""

    plan: Plan  # the chosen plan; dense where none held the budget
    candidates: list[Scored]  # all that were scored on the searched part, baselines included
    verified: Verified  # what came of the held-out part
    # for each mechanism of the chosen plan, figures of the plan without it, on the searched part
    leave_one_out: dict[str, dict[str, Any]]


def verify(candidates: Sequence[Scored], budget: Budget, score: Callable[[Scored], dict[str, Any]]) -> Verified:
    """Return the first candidate, from the most saved to the least, that holds the budget on held-out text."""
    failed: list[tuple[Scored, dict[str, Any]]] = []
    for candidate in candidates:
        row = score(candidate)
        if budget.holds(row):
            return Verified(candidate, row, failed)
        failed.append((candidate, row))
    return Verified(None, None, failed)


class Calibrator:
    """One calibration of one model, whose parts of a text `window_config` cut.

    Args:
        model: as it is, the baseline.
        runner: that runs candidates: the same, or its copy with any-precision weights.
        folder: where what was found is kept, and found again.
        fingerprint: of the model's weights and of the text.
        progress: shows how far each phase is.
    """

    def __init__(
        self,
        model: QuickSilverForCausalLM,
        runner: QuickSilverForCausalLM,
        parts: Split,
        window_config: WindowConfig,
        settings: Settings,
        folder: Path,
        fingerprint: str,
        name: str,
        progress: Callable[[str, int], AbstractContextManager[Callable[[], None]]],
    ) -> None:
        self._runner, self._parts, self._settings, self._progress = runner, parts, settings, progress
        self._folder, self._fingerprint = folder, fingerprint
        self._ends: float | None = None
        interleaved = settings.objective == "seconds"
        self._scorers = [
            Scorer(model, runner, part, window_config, name, interleaved) for part in (parts.search, parts.held_out)
        ]
        self._rough = Scorer(model, runner, parts.search.thinned(_ROUGH_STEP), window_config, name, interleaved)

    def run(self) -> Calibration:
        with keeping_expanded(self._runner.model):
            return self._run()

    def _run(self) -> Calibration:
        data = self._fit()
        candidates = [*self._baselines(data), *self._search(data)]
        settings, score = self._settings, self._scorers[1].score
        holding = eligible(candidates, settings.objective, settings.budget)
        with self._progress("verifying on held-out text", 1) as advance:
            verified = verify(
                holding, settings.budget, lambda each: self._kept("held-out", self._plan(each, data), score)
            )
            advance()
        chosen = verified.chosen
        if chosen is None:
            return Calibration(Plan.dense(), candidates, verified, {})
        return Calibration(self._plan(chosen, data), candidates, verified, self._leave_one_out(chosen, data))

    def _fit(self) -> CalibrationData:
        path, adapter, settings = self._folder / "data.safetensors", self._runner.adapter, self._settings
        key = self._key(settings.mechanisms, settings.objective, settings.bits, len(self._parts.fit))
        data = data_file.read(path, key, adapter.spec)
        if data is not None:
            return data
        units = unit_costs(settings.objective, adapter.spec, *self._scorers[0].dense_cost(adapter))
        special_ids = self._runner.special_ids
        total = fitting.steps(adapter, settings.mechanisms, len(self._parts.fit))
        with self._progress("fitting", total) as advance:
            data = fitting.fit(
                adapter, settings.mechanisms, units, self._parts.fit, settings.bits, special_ids, advance
            )
        data_file.write(path, key, data)
        return data

    def _search(self, data: CalibrationData) -> Iterator[Scored]:
        settings = self._settings
        searched, always = self._switches(data)
        search = Search(searched, settings.budget, settings.objective, settings.fills, settings.trials, always)
        key = self._key(
            "together",
            asdict(settings.budget),
            settings.objective,
            settings.mechanisms,
            settings.seed,
            settings.trials,
            tuple(FILLS) if settings.fills else (),
        )
        if "entries" in settings.mechanisms:
            alone = Candidate(0.0, {"entries": 1.0})
            plan = build(alone, data, "entries", settings.bits)
            yield Scored("entries", self._kept("search", plan, self._scorers[0].score), alone)
        trials = Trials(self._folder / "study.log", key, settings.objective, settings.seed)

        def score(parameters: dict[str, Any]) -> dict[str, Any] | None:
            plan = build(search.candidate(parameters, trials.finished), data, "candidate", settings.bits)
            return self._kept("rough", plan, self._rough.score) if ROUGH in parameters else self._searched(plan)

        with self._progress("searching", settings.trials) as advance:
            trials.run(search.propose, score, settings.trials, self._deadline(), advance)
        yield from search.scored(trials.finished)

    def _switches(self, data: CalibrationData) -> tuple[list[Mechanism], list[Mechanism]]:
        """Return the mechanisms to search, and those that every candidate has.

        Coded entries are searched where they save what is asked for; elsewhere they are taken where they cost next to
        nothing: the cache holds a fraction of its bytes then.
        """
        settings = self._settings
        searched: list[Mechanism] = [name for name in settings.mechanisms if name != "entries"]
        if "entries" not in settings.mechanisms:
            return searched, []
        if settings.objective in ("bitops", "kv_bytes"):
            return [*searched, "entries"], []
        free = data.entry_nats <= _FREE * settings.budget.nats(self._scorers[0].dense_nll)
        return searched, ["entries"] if free else []

    def _baselines(self, data: CalibrationData) -> Iterator[Scored]:
        """Score the published rules with tuned thresholds, and every token's exit at one layer."""
        settings, score = self._settings, self._scorers[0].score
        paper = PaperSearch(self._runner.adapter, self._parts.fit[0])
        key = self._key("paper", asdict(settings.budget), settings.objective, settings.seed)
        trials = Trials(self._folder / "study.log", key, settings.objective, settings.seed)
        with self._progress("tuning the published rules", _PAPER_TRIALS) as advance:
            trials.run(
                paper.propose,
                lambda parameters: self._searched(paper.plan(parameters)),
                _PAPER_TRIALS,
                self._deadline(),
                advance,
            )
        yield Scored("paper, as published", self._kept("search", Plan.preset("paper"), score))
        for trial in trials.finished:
            if trial.user_attrs:
                yield Scored("paper", trial.user_attrs["row"])
        with self._progress("static exits", len(data.halt_layers)) as advance:
            for layer_idx in reversed(data.halt_layers):
                row = self._kept("search", static_exit(layer_idx, data), score)
                yield Scored("exit", row)
                advance()
                if settings.budget.upper(row) > _EXITS_TO * settings.budget.limit:
                    break

    def _leave_one_out(self, chosen: Scored, data: CalibrationData) -> dict[str, dict[str, Any]]:
        if chosen.candidate is None or len(chosen.candidate.factors) < 2:
            return {}
        without = {name: chosen.candidate.without(name) for name in chosen.candidate.factors}
        with self._progress("leaving each mechanism out", len(without)) as advance:
            rows = {}
            for name, candidate in without.items():
                plan = build(candidate, data, f"without {name}", self._settings.bits)
                rows[name] = self._kept("search", plan, self._scorers[0].score)
                advance()
        return rows

    def _plan(self, candidate: Scored, data: CalibrationData) -> Plan:
        if candidate.candidate is not None:
            return build(candidate.candidate, data, "calibrated", self._settings.bits)
        depth = candidate.row["plan"]["halting"]["min_layer"] if candidate.group == "exit" else None
        return static_exit(depth - 1, data) if depth else Plan.from_dict(candidate.row["plan"])

    def _searched(self, plan: Plan) -> dict[str, Any] | None:
        """Return a candidate's figures on the searched part, None where it is given up; other budgets may know it."""
        return self._kept("search", plan, lambda plan: self._scorers[0].score(plan, self._settings.budget))

    def _kept(self, part: str, plan: Plan, score: Callable[[Plan], dict[str, Any] | None]) -> Any:
        """Return a plan's figures on a part of the text, those found in the folder where it was scored before."""
        path = self._folder / f"{self._key(part, self._settings.objective)}.{plan.hash}.json"
        if not path.is_file():
            row = score(plan)
            if row is None:
                return None
            write_atomically(path, json.dumps(row))
        return json.loads(path.read_text(encoding="utf-8"))

    def _key(self, *facts: Any) -> str:
        return hashlib.sha256(json.dumps([self._fingerprint, *facts], default=str).encode()).hexdigest()[:16]

    def _deadline(self) -> float | None:
        """Return when the search ends, counted from the first time it is asked for."""
        if self._ends is None and self._settings.time_limit is not None:
            self._ends = time.monotonic() + self._settings.time_limit
        return self._ends
