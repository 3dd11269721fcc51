"""Trials kept in one file: found again after an interruption, and dependent only on the seed and the trials before."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from quicksilver.calibrate.objectives import Objective
from quicksilver.calibrate.scoring import saved
from quicksilver.core.files import write_atomically

Space = dict[str, BaseDistribution]
Propose = Callable[[Sequence[FrozenTrial]], tuple[Space, dict[str, Any] | None]]
"""From the finished trials to the space of the next, and its parameters where they are not Optuna's to choose."""


class Trials:
    """One study of two objectives, nats lost and share saved, kept under a key in a file with others."""

    def __init__(self, path: Path, key: str, objective: Objective, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        _end_with_a_line(path)
        self._objective: Objective = objective
        self._seed = seed
        self._study = optuna.create_study(
            study_name=key,
            storage=JournalStorage(JournalFileBackend(str(path))),
            directions=["minimize", "maximize"],
            load_if_exists=True,
        )

    @property
    def finished(self) -> list[FrozenTrial]:
        """Trials scored in full, or given up, in order."""
        return self._study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED), deepcopy=False)

    def run(
        self,
        propose: Propose,
        score: Callable[[dict[str, Any]], dict[str, Any] | None],
        count: int,
        deadline: float | None = None,
        on_trial: Callable[[], None] = lambda: None,
    ) -> None:
        """Score trials until there are `count`, those found in the file included, or time is up.

        `propose` says what comes next; `score` goes from parameters to a candidate's figures, None where it is
        hopeless; `on_trial` is called after each, and for each that was found.
        """
        for trial in self._study.get_trials(states=(TrialState.RUNNING,), deepcopy=False):
            self._study.tell(trial.number, state=TrialState.FAIL)  # interrupted
        for _ in self.finished[:count]:
            on_trial()
        while len(finished := self.finished) < count and (deadline is None or time.monotonic() < deadline):
            trial = self._ask(propose, finished)
            row = score(trial.params)
            if row is None:
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                trial.set_user_attr("row", row)
                self._study.tell(trial, (row["delta"]["nll"], saved(row, self._objective)))
            on_trial()

    def _ask(self, propose: Propose, finished: Sequence[FrozenTrial]) -> optuna.Trial:
        self._study.sampler = optuna.samplers.TPESampler(seed=self._seed * 100003 + len(finished), n_startup_trials=0)
        space, parameters = propose(finished)
        waiting = self._study.get_trials(states=(TrialState.WAITING,), deepcopy=False)
        if parameters is not None and not waiting:
            self._study.enqueue_trial(parameters)
        return self._study.ask(space)


def _end_with_a_line(path: Path) -> None:
    """Cut off what a machine that went down in the middle of a write left: Optuna would join the next line to it."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        write_atomically(path, content[: content.rfind(b"\n") + 1])
