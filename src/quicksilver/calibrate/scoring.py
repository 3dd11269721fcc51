"""Scoring candidates against the dense model, which is run once, on the search's windows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quicksilver.calibrate.objectives import Objective
from quicksilver.calibrate.splits import Part
from quicksilver.families.cost import Cost, dense_cost
from quicksilver.families.spec import Adapter
from quicksilver.measure.report import build_rows
from quicksilver.measure.scoring import EngineRecord, Fed, compare, feed, new_record
from quicksilver.measure.statistics import PairedDelta, paired_delta
from quicksilver.measure.windows import WindowConfig
from quicksilver.model import QuickSilverForCausalLM
from quicksilver.plan import Plan
from quicksilver.runtime.loop import Decoder

_REDUCTION = {
    "flops": "flops_reduction",
    "bitops": "bitops_reduction_8bit",
    "weight_bytes": "weight_bytes_reduction_8bit",
    "kv_bytes": "kv_used_bytes_reduction",
}


@dataclass(frozen=True)
class Budget:
    """How much a plan may lose, in perplexity or in nats per token.

    Attributes:
        limit: the most.
        unit: "ppl" or "nll".
    """

    limit: float
    unit: str

    def upper(self, row: dict[str, Any]) -> float:
        """Return the upper end of the interval of what a row of figures lost, on the text where that is highest.

        It is infinite where there is no interval.
        """
        intervals = [delta[f"{self.unit}_ci95"] for delta in row["delta_by_text"].values()]
        return max(float("inf") if interval is None else interval[1] for interval in intervals)

    def nats(self, loss: float) -> float:
        """Return the limit in nats per token, for a model that loses `loss` nats per token as it is."""
        return self.limit if self.unit == "nll" else math.log1p(self.limit / math.exp(loss))

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether a row's loss is inside the budget with its whole interval."""
        return self.upper(row) <= self.limit

    def is_hopeless(self, delta: PairedDelta) -> bool:
        """Whether what some windows lost lies far outside: the lower end beyond twice the limit."""
        interval = delta.ppl_ci95 if self.unit == "ppl" else delta.nll_ci95
        return interval is not None and interval[0] > 2 * self.limit


class Scorer:
    """Candidates' figures on one text.

    Args:
        model: the model as it is, the baseline.
        runner: the model that runs candidates that choose bits: the same, or its copy with any-precision weights.
        part: windows of each text, of which several are needed for intervals.
        window_config: that cut them.
        name: of the model.
        interleaved: run the dense model again beside every candidate, so that seconds can be compared.
    """

    def __init__(
        self,
        model: QuickSilverForCausalLM,
        runner: QuickSilverForCausalLM,
        part: Part,
        window_config: WindowConfig,
        name: str,
        interleaved: bool = False,
    ) -> None:
        self._text, self._sections, self._protocol, self._name = part.text, part.sections, window_config, name
        self._model, self._runner, self._interleaved = model, runner, interleaved
        self._dense = new_record(Decoder(model.adapter, Plan.dense(), model.special_ids))
        self._fed = [feed(self._dense, window, "score") for window in self._text.windows]
        for window, fed in zip(self._text.windows, self._fed, strict=True):
            compare([self._dense], [_unclocked(fed)], window)

    def score(
        self, plan: Plan, budget: Budget | None = None, on_window: Callable[[], None] = lambda: None
    ) -> dict[str, Any] | None:
        """Return a plan's figures as `eval --json` has them, or None where it was given up as hopeless for a budget."""
        runner = self._model if plan.precision is None else self._runner
        record = new_record(Decoder(runner.adapter, plan, runner.special_ids))
        baseline = _blank(self._dense)
        counts: list[int] = []
        for window, known in zip(self._text.windows, self._fed, strict=True):
            fed = feed(new_record(self._dense.decoder), window, "score") if self._interleaved else _unclocked(known)
            compare([baseline, record], [fed, feed(record, window, "score")], window)
            counts.append(window.num_scored)
            on_window()
            if budget is not None and len(counts) in _checkpoints(len(self._fed)):
                delta = paired_delta(baseline.nll, record.nll, counts)
                if budget.is_hopeless(delta):
                    return None
        row = build_rows([baseline, record], self._text, self._protocol, "score", self._name)[0]
        row["delta_by_text"] = self._delta_by_text(baseline.nll, record.nll, counts)
        cost, tokens = self.dense_cost(self._runner.adapter)
        for name, total in (("bitops", cost.bitops), ("weight_bytes", cost.weight_bytes)):
            row["delta"][f"{name}_reduction_8bit"] = 1.0 - row["accelerated"][f"{name}_per_token"] * tokens / total
        return row

    def _delta_by_text(
        self, dense: Sequence[float], plan: Sequence[float], counts: Sequence[int]
    ) -> dict[str, dict[str, Any]]:
        """Return what was lost on each text, from the windows' totals."""
        deltas, start = {}, 0
        for name, size in self._sections:
            rows = slice(start, start + size)
            deltas[name] = asdict(paired_delta(dense[rows], plan[rows], counts[rows]))
            start += size
        return deltas

    @property
    def dense_nll(self) -> float:
        """What the model as it is loses on the text, nats per token."""
        return sum(self._dense.nll) / sum(window.num_scored for window in self._text.windows)

    def dense_cost(self, adapter: Adapter) -> tuple[Cost, int]:
        """Return what the dense model with an adapter's weights spends on all windows, and how many tokens it feeds."""
        return dense_cost(adapter.spec, self._dense.trace), self._dense.trace.tokens


def _blank(dense: EngineRecord) -> EngineRecord:
    """Return a record with the costs of a run whose predictions are still to be made."""
    traces = copy.deepcopy((dense.trace, dense.prompt_trace))
    for trace in traces:
        trace.head_rows = 0
    return EngineRecord(dense.decoder, *traces, kv_bytes=dense.kv_bytes, kv_used_bytes=dense.kv_used_bytes)


def _unclocked(fed: Fed) -> Fed:
    """Return what a run gave with clocks of its own, which the head's time is added to."""
    return fed._replace(clock=copy.copy(fed.clock), prompt_clock=copy.copy(fed.prompt_clock))


def _checkpoints(count: int) -> Sequence[int]:
    return (max(count // 4, 4), count // 2)


def saved(row: dict[str, Any], objective: Objective) -> float:
    """Return the share of what is to be saved that a row of figures saved."""
    if objective == "seconds":
        return 1.0 - 1.0 / row["delta"]["speedup"]
    return row["delta"][_REDUCTION[objective]]
