"""What the comparison with other engines makes of its figures: quality, bars, tables; no engine is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.gate import GateError
from benchmarks.peers import limits, ours, quality, report, roster
from benchmarks.peers.__main__ import main
from benchmarks.peers.engines import CT2, HUGGINGFACE, PEERS, Q4, Q8
from benchmarks.peers.limits import STREAMING_READ
from benchmarks.peers.subjects import Subject
from benchmarks.rows import Measurement

GPT2 = Subject("gpt2", Path("nowhere"), Path("nowhere/float"), is_random=True)
READ = Measurement("bandwidth", STREAMING_READ, STREAMING_READ, "bytes per second", (20e9, 10e9, 20e9), {})


def decoded(engine: str, *values: float, baseline: str = Q8) -> Measurement:
    return Measurement("decode", engine, baseline, "seconds per token", values, {})


def test_equal_logits_are_of_perfect_quality() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 7)).astype(np.float32)
    found = quality.compare(logits, logits)
    assert found.to_dict() == {
        "max_abs": 0.0, "mean_abs": 0.0, "relative": 0.0, "kl": 0.0, "top1_agreement": 1.0, "tokens": 20,
    }  # fmt: skip


def test_quality_is_what_it_says() -> None:
    """Over more rows than are taken at a time: every second row has its two logits swapped."""
    reference = np.tile(np.array([[0.0, 2.0]], dtype=np.float32), (40, 1))
    logits = reference.copy()
    logits[::2] = logits[::2, ::-1]
    found = quality.compare(reference, logits)
    assert (found.max_abs, found.mean_abs, found.top1_agreement, found.tokens) == (2.0, 1.0, 0.5, 40)
    assert found.relative == pytest.approx(2**0.5)
    p = 1 / (1 + np.exp(-2.0))
    assert found.kl == pytest.approx(0.5 * 2.0 * (2 * p - 1))


def test_a_shift_of_all_logits_costs_no_divergence() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    assert quality.compare(logits, logits + 4).kl == pytest.approx(0.0, abs=1e-9)


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        quality.compare(np.zeros((2, 3)), np.zeros((2, 4)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_do_not_pass_the_gate(value: float) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5))
    broken = logits.copy()
    broken[1, 1] = value
    with np.errstate(invalid="ignore"), pytest.raises(GateError, match=r"^uniform-8: "):
        limits.check({Q8: quality.compare(logits, logits), ours.UNIFORM_8: quality.compare(logits, broken)})


def test_every_engine_but_forced_halting_has_a_tolerance() -> None:
    free = {name for name in (*PEERS, *ours.RANDOM_PLANS, ours.MILD) if name not in limits.TOLERANCES}
    assert free == {name for name in ours.RANDOM_PLANS if name.endswith(ours.HALF)}


def test_bars_are_medians_of_ratios_within_rounds() -> None:
    measured = [READ, decoded(Q8, 0.02, 0.04, 0.03), decoded(ours.UNIFORM_8, 0.01, 0.05, 0.02)]
    sizes = {Q8: 2e8, ours.UNIFORM_8: 1e8}
    (verdict,) = limits.judge("gpt2", measured, sizes)
    assert (verdict.ratio, verdict.passed) == (1.5, True)
    assert verdict.quantity == "llama.cpp-q8_0 / uniform-8"


def test_bandwidth_is_paired_with_the_round_it_was_measured_in() -> None:
    measured = [READ, decoded(Q8, 0.02, 0.04, 0.02), decoded(ours.UNIFORM_8, 0.01, 0.02, 0.01)]
    sizes = {Q8: 2e8, ours.UNIFORM_8: 1e8}
    assert limits.bandwidth_fraction(ours.UNIFORM_8, measured, sizes) == pytest.approx(0.5)
    verdicts = limits.judge("llama1b", measured, sizes)
    assert [(v.bar.limit, round(v.ratio, 3), v.passed) for v in verdicts] == [(1.0, 2.0, True), (0.8, 0.5, False)]


def test_bars_of_engines_that_were_left_out_are_not_judged() -> None:
    assert limits.judge("llama1b", [READ, decoded(Q8, 0.1, 0.1, 0.1)], {Q8: 1e8}) == []
    assert limits.judge("a-folder", [READ, decoded(Q8, 0.1, 0.1, 0.1)], {Q8: 1e8}) == []


def test_mild_must_beat_every_peer_end_to_end() -> None:
    times = {HUGGINGFACE: 0.9, Q8: 0.5, Q4: 0.4, CT2: 0.2, ours.MILD: 0.3}
    measured = [Measurement("generate", name, Q8, "seconds", (time,), {}) for name, time in times.items()]
    verdicts = limits.judge("ref-llama", [READ, *measured], dict.fromkeys(times, 1e6))
    assert {v.baseline: v.passed for v in verdicts} == {HUGGINGFACE: True, Q8: True, Q4: True, CT2: False}


def test_a_missing_package_is_named_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "find_spec", lambda module: None)
    said: list[str] = []
    assert roster.select(GPT2, ["peers", "uniform-8"], said.append) == [HUGGINGFACE, ours.UNIFORM_8]
    assert f"{Q8} is left out: pip install llama-cpp-python gguf" in said
    assert f"{CT2} is left out: pip install ctranslate2" in said
    assert len(said) == 3


def test_halting_brings_the_plan_it_is_compared_with() -> None:
    names = roster.select(GPT2, ["channel-5.2-half"], pytest.fail)
    assert names == [ours.CHANNEL, ours.CHANNEL + ours.HALF]
    assert ours.fitted_plans([ours.CHANNEL + ours.HALF]) == [ours.CHANNEL]


def test_halves_are_the_same_plan_with_every_second_token_halted() -> None:
    whole, half = (ours.plan_of(name, GPT2, 12) for name in (ours.UNIFORM_8, ours.UNIFORM_8 + ours.HALF))
    assert half.precision == whole.precision
    assert whole.halting is None
    assert half.halting is not None
    assert half.halting.rule.depths == (12, 6)


def test_an_unknown_engine_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--engines", "vllm", "--work", str(tmp_path)])
    assert result.exit_code == 2
    assert "vllm is no engine" in result.output
    assert list(tmp_path.iterdir()) == []


def row(task: str, engine: str, median: float, **more: Any) -> dict[str, Any]:
    settings = {"rounds": 9, "new_tokens": 64, "prompt_tokens": 64, "prefill_tokens": 512, "quick": False}
    model = {"name": "gpt2", "family": "gpt2", "layers": 12, "hidden_size": 768, "vocab_size": 50257}
    found = quality.Quality(0.1, 0.01, 0.02, 1e-4, 0.99, 128).to_dict()
    after = quality.Quality(0.5, 0.05, 0.08, 3e-2, 0.0, 1).to_dict()
    return {
        "task": task, "engine": engine, "median": median, "baseline": Q8, "ratio_to_baseline": 0.5, "date": "today",
        "model": {**model, "weights": "random, seed 0", "dtype": "float32"}, "settings": settings, "bars": [],
        "peers": {"gguf": "1.0", "ctranslate2": None}, "threads": 2, "cpu": "cpu", "quicksilver": "0", "torch": "2",
        "transformers": "5", "command": "python -m benchmarks.peers", "quality": found, "prefill_quality": after,
        **more,
    }  # fmt: skip


def run_of_two() -> list[dict[str, Any]]:
    read = row("bandwidth", STREAMING_READ, 20e9, method="sum")
    del read["quality"], read["prefill_quality"]
    size = {"weight_bytes_per_token": 1e8, "bandwidth_fraction": 0.5}
    bar = {"task": "decode", "quantity": "a / b", "ratio": 1.2, "bound": "at least", "limit": 1.0, "passed": True}
    return [
        read,
        row("prefill", Q8, 0.3),
        row("decode", Q8, 0.02, **size),
        row("memory", Q8, 3e8),
        row("decode", ours.UNIFORM_8, 0.01, **size, bars=[bar]),
    ]


def test_a_table_has_a_cell_for_every_column_and_no_ratio_to_itself() -> None:
    text = report.markdown(run_of_two())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {18}
    theirs, mine = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    assert theirs[:6] == [Q8, "20.00", "50.0", "", "100.0", "0.50"]
    assert mine[:6] == ["uniform-8", "10.00", "100.0", "2.00 llama.cpp-q8_0", "100.0", "0.50"]
    assert (theirs[6], theirs[9], mine[6], mine[9]) == ("300.0", "300", "", "")
    assert theirs[10:] == ["1.00e-04", "99.0%", "0.1", "0.01", "3.00e-02", "other", "0.5"]
    assert "- pass: decode, a / b = 1.200, at least 1.00" in text
    assert "gguf 1.0" in text
    assert "ctranslate2 None" not in text


def test_rows_that_do_not_say_how_near_the_prompt_came_have_empty_cells() -> None:
    rows = [{key: value for key, value in row.items() if key != "prefill_quality"} for row in run_of_two()]
    lines = [line for line in report.markdown(rows).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {18}
    assert all(line.split("|")[-4:-1] == ["  "] * 3 for line in lines[2:])


def test_only_the_last_run_of_a_model_is_shown() -> None:
    old = [{**each, "date": "yesterday"} for each in run_of_two()]
    other = [{**each, "model": {**each["model"], "name": "llama1b"}} for each in run_of_two()]
    runs = report.latest([*old, *other, *run_of_two()])
    assert [(rows[0]["model"]["name"], rows[0]["date"], len(rows)) for rows in runs] == [
        ("gpt2", "today", 5),
        ("llama1b", "today", 5),
    ]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    report.draw(tmp_path / "peers.png", [run_of_two()])
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_an_engine_has_one_colour_in_all_panels_and_every_panel_a_title() -> None:
    other = [{**each, "model": {**each["model"], "name": "llama1b"}} for each in run_of_two()]
    other = [each for each in other if each["engine"] != Q8]  # so that colours by place would differ
    figure = report.figure([run_of_two(), other])
    colours: dict[str, set[str]] = {}
    for axes in figure.axes:
        for points in axes.collections:
            colours.setdefault(points.get_label(), set()).add(str(points.get_facecolor().tolist()))
    assert set(colours) == {Q8, ours.UNIFORM_8}
    assert all(len(each) == 1 for each in colours.values())
    assert colours[Q8] != colours[ours.UNIFORM_8]
    assert [axes.get_title().split(":")[0] for axes in figure.axes] == ["gpt2", "gpt2", "llama1b", "llama1b"]


def test_ticks_of_speeds_and_bytes_are_round_numbers() -> None:
    figure = report.figure([run_of_two()])
    figure.canvas.draw()
    left, right = figure.axes
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        assert len(labels) >= 2
        assert all(re.fullmatch(r"0*\.?0*(1|1\.5|15|2|3|4|5|7)0*", label) for label in labels), labels
        assert not axis.get_minorticklocs().size
