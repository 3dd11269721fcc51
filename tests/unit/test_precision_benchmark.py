"""What the precision benchmark prints: a table that Markdown reads, and all that its plans were made with."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from benchmarks import precision
from quicksilver.loading.load import accelerate
from quicksilver.measure.report import evaluate
from quicksilver.measure.texts import Corpus
from quicksilver.measure.windows import WindowConfig, cut
from quicksilver.plan import Plan
from quicksilver.weights.config import QuantizationConfig
from tests import tiny
from tests.engines import precision_plan


def test_rows_have_as_many_cells_as_the_table_has_columns() -> None:
    """With every name that a row may have."""
    window_config, windows = WindowConfig(32, 32, None), [tiny.token_ids(30)]
    text = cut(Corpus("text", ("The river rises in the hills. " * 3,), separate=False), tiny.tokenizer(), window_config)
    plans = [precision_plan(precision.UniformBitsRule(bits)) for bits in (8, 6)]
    measured = evaluate(accelerate(tiny.quantized("llama")), plans, text, window_config, name="tiny")
    quantizing = precision.settings(QuantizationConfig(embeddings=False), "book.txt", windows * 2, windows)
    rows = [{**row, "nesting": quantizing} for row in measured]
    rows += [{**rows[0], "plan": {"name": name}} for name, _ in precision.wanted()]
    table = precision.markdown(rows)
    assert "calibration book.txt, 60 tokens for codes, the first 30 of them for thresholds" in table
    assert "the first 4 tokens and special ones read 8 bits, but for uniform bits" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {17}
    assert lines[0].split(" | ")[2:7] == ["8", "6", "4", "2", "0"]
    assert lines[2].split(" | ")[2:7] == ["100.0%", "0.0%", "0.0%", "0.0%", "0.0%"]
    assert lines[3].split(" | ")[2:7] == ["0.0%", "100.0%", "0.0%", "0.0%", "0.0%"]


def test_protection_is_what_the_heading_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fit", lambda adapter, plan, windows, special_ids: plan)
    plans: list[Plan] = precision.plans_for(accelerate(tiny.quantized("llama")), [torch.arange(9)])
    for plan in plans:
        assert plan.precision is not None
        uniform = isinstance(plan.precision.rule, precision.UniformBitsRule)
        assert (plan.precision.protect_first, plan.precision.protect_special) == ((0, False) if uniform else (4, True))


def test_other_group_sizes_are_refused_before_anything_is_loaded() -> None:
    result = CliRunner().invoke(precision.main, ["nowhere", "--group-size", "48", "-o", "out"])
    assert result.exit_code == 2
    assert "48" in result.output
    assert "32" in result.output
