"""What `quicksilver eval` prints, and what it says of a plan's making: tables, names and settings."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quicksilver.cli.table import _COST, _LOSS, _PARTS_RAN, _RAN, EXPLANATION, print_table
from tests.e2e.conftest import CUT, FORCED, RANDOM, SENTENCES, Outcome

UNIFORM = {"rule": {"type": "uniform", "bits": 4}}


def test_stdout_is_the_table_and_stderr_is_empty(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], text_file: Path, plan_file: Callable[..., Path]
) -> None:
    mine = plan_file(halting=FORCED)
    outcome = cli("eval", tiny_model_dir("gpt2"), "--text", text_file, "--plan", "dense", "--plan", mine, *CUT)
    assert (outcome.status, outcome.said) == (0, [])
    heading, *tables = outcome.out.split("\n\n")
    heading = " ".join(heading.split())
    assert heading.split(" ", 1)[1].startswith("(gpt2, 4 layers, ")
    assert " on book.txt: 239 tokens scored in 14 windows context 32, stride 16, no BOS, mode score; cpu, " in heading
    assert re.search(
        r" dense is the float32 weights as loaded dense: \d\.\d{4} nats per token, \S+ bits per byte$", heading
    )
    assert [rows(table) for table in tables[:3]] == [["plan", "dense", "mine"]] * 3
    assert "\x1b" not in outcome.out


PARTS = {
    "skipping": {"skip_below": 0.9},
    "entries": {"bits": 16},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_plan_of_one_part_has_its_row_in_every_table(
    cli: Callable[..., Outcome],
    tiny_model_dir: Callable[[str], Path],
    text_file: Path,
    plan_file: Callable[..., Path],
    tmp_path: Path,
    part: str,
) -> None:
    given = ("--plan", "settled", "--plan", plan_file(kv=PARTS[part]), "--json", tmp_path / "out.json")
    outcome = cli("eval", tiny_model_dir("gpt2"), "--text", text_file, *given, *CUT)
    assert outcome.status == 0, outcome.err
    tables = outcome.out.split("\n\n")[1:4]
    assert [rows(table) for table in tables] == [["plan", "dense", "settled", "mine"]] * 3
    side = json.loads((tmp_path / "out.json").read_text())[1]["accelerated"]
    shares = [f"{side[name]:.1%}" for name in ("query_components_read", "values_read")]
    above, below, dense, settled, mine = (re.split(r"\s{2,}", line.strip()) for line in tables[2].splitlines())
    assert above == ["layers", "tokens", "weight", "scores", "values", "MLP, attn.", "cache"]
    assert below == ["plan", "run", "fused", "bits", "done", "read", "skipped", "bits"]
    assert dense == ["dense", "4", "32", "100.0%", "100.0%", "32"]
    assert settled[3:] == ["32", "100.0%", "100.0%", "0.0%", "32"]
    assert mine == ["mine", "4.00", "0.0%", "32", *shares, "0.0%", "16" if part == "entries" else "32"]
    assert (shares == ["100.0%", "100.0%"]) == (part == "entries")


def test_a_plan_of_shortcuts_has_its_row(
    evaluate: Callable[..., Any], tiny_model_dir: Callable[[str], Path], text_file: Path
) -> None:
    """Shortcuts need fitted tensors, so a measured result is dressed up as one of theirs."""
    (result,) = evaluate(tiny_model_dir("gpt2"), "--text", text_file, "--plan", "settled", *CUT)
    result["plan"] = {"version": 2, "name": "past", "halting": {"shortcuts": []}}
    result["accelerated"]["shortcuts_by_layer"] = {"mlp": [1.0, 0.0, 0.0, 0.0], "attention": [0.5, 0.0, 0.0, 0.0]}
    out = io.StringIO()
    print_table([result], out)
    tables = out.getvalue().split("\n\n")[1:4]
    assert [rows(table) for table in tables] == [["plan", "dense", "past"]] * 3
    assert tables[2].splitlines()[3].split()[3:] == ["32", "100.0%", "100.0%", "18.8%", "32"]


def test_a_plan_file_with_everything_off_has_its_row(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], text_file: Path, plan_file: Callable[..., Path]
) -> None:
    outcome = cli("eval", tiny_model_dir("gpt2"), "--text", text_file, "--plan", plan_file(), *CUT)
    assert rows(outcome.out.split("\n\n")[1]) == ["plan", "dense", "mine"]


def rows(table: str) -> list[str]:
    """Return the first column of a printed table, its heading included, which stands in the second of two lines."""
    return [re.split(r"\s{2,}", line)[0] for line in table.splitlines()[1:]]


@pytest.mark.parametrize("mode", ["score", "decode"])
def test_headings_hold_the_units_and_two_lines_explain_the_rest(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], text_file: Path, mode: str
) -> None:
    arguments = ("--text", text_file, "--plan", "settled", "--mode", mode, *CUT)
    outcome = cli("eval", tiny_model_dir("gpt2"), *arguments)
    assert outcome.status == 0, outcome.err
    _, *tables, legend = outcome.out.split("\n\n")
    assert len(tables) == 3
    loss, cost, ran = ([" ".join(line.split()) for line in table.splitlines()[:2]] for table in tables)
    assert loss == ["Δnll FLOPs in the", "plan ppl Δppl [95 % CI] [nats] saved layers"]
    assert cost == ["KL top-1 bitops weights KV cache speed", "plan [nats] same saved saved saved [x dense]"]
    assert ran == ["layers tokens weight", "plan run fused bits"]
    assert len(legend.splitlines()) == 2
    assert max(map(len, legend.splitlines())) <= 80
    assert ("--mode decode" in legend) == (mode == "score")


def test_every_column_is_explained_without_a_model(cli: Callable[..., Outcome]) -> None:
    outcome = cli("eval", "--explain")
    assert (outcome.status, outcome.said) == (0, [])
    assert outcome.out.strip() == EXPLANATION
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in (*_LOSS, *_COST, *_RAN, *_PARTS_RAN):
        assert any(line.startswith(f"{' '.join(name.split())}  ") for line in lines), name


@pytest.mark.parametrize("ppl", [1.0, 999.9994, 123456.789, 9.87e11, 1e300])
def test_tables_fit_80_columns(
    evaluate: Callable[..., Any],
    tiny_model_dir: Callable[[str], Path],
    text_file: Path,
    plan_file: Callable[..., Path],
    ppl: float,
) -> None:
    mine = plan_file("a-plan-with-a-long-name-indeed.json", halting=FORCED, precision=UNIFORM)
    (result,) = evaluate(tiny_model_dir("gpt2"), "--text", text_file, "--plan", mine, *CUT)
    result["accelerated"]["ppl"] = result["dense"]["ppl"] = ppl
    result["delta"] |= {"ppl": -ppl, "ppl_ci95": [-ppl, ppl], "nll": -12.3456, "kl": 12.3456, "flops_reduction": -5.0}
    out = io.StringIO()
    print_table([result], out)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    shown = {1.0: "1.000", 999.9994: "999.999", 123456.789: "123457", 9.87e11: "9.9e+11", 1e300: "1.0e+300"}[ppl]
    assert any(line.startswith("dense ") and f" {shown} " in line for line in lines)
    assert sum(f"-{shown} [-{shown}, +{shown}]" in line for line in lines) == 1


@pytest.mark.parametrize("quantized", [False, True])
def test_settings_say_what_was_quantized_and_fitted(
    cli: Callable[..., Outcome],
    tiny_model_dir: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    quantized: bool,
) -> None:
    folder, result = tiny_model_dir("llama"), tmp_path / "out.json"
    if quantized:
        options = ("--group-size", 64, "--calibration", text_file)
        assert cli("quantize", folder, "-o", tmp_path / "quantized", *options).status == 0
        folder = tmp_path / "quantized"
    options = ("--text", text_file, "--plan", "settled", "--plan", "channel-5bit", "--calibration", text_file)
    outcome = cli("eval", folder, *options, *CUT, "--json", result)
    settled, channel = (row["settings"] for row in json.loads(result.read_text()))
    heading = " ".join(outcome.out.split())
    calibration = {"source": "book.txt", "tokens": len(SENTENCES * 3), "model": folder.name}
    assert (settled["calibration"], channel["calibration"]) == (None, calibration)
    assert settled["baseline"] == channel["baseline"] == ("nested" if quantized else "plain")
    sizes = {"method": "compensated" if quantized else "nearest", "group_size": 64 if quantized else 32}
    quantizing = {**sizes, "head": quantized, "embeddings": quantized, "in_memory": not quantized}
    assert channel["nesting"] == quantizing
    assert settled["nesting"] == (quantizing if quantized else None)
    if quantized:
        assert "dense is the any-precision weights (compensated, groups of 64), all 8 bits of them read" in heading
    else:
        assert "dense is the float32 weights as loaded; plans that choose bits read them quantized in memory" in heading


def test_plans_of_one_name_are_told_apart(
    evaluate: Callable[..., Any], tiny_model_dir: Callable[[str], Path], text_file: Path, plan_file: Callable[..., Path]
) -> None:
    plans = [plan_file(f"{file}.json", name="settled", halting=FORCED) for file in ("one", "two")]
    (plans[0].parent / "deeper").mkdir()
    plans.append(plan_file("deeper/two.json", name="settled", halting=RANDOM))
    given = [argument for plan in ("settled", *plans, "paper") for argument in ("--plan", plan)]
    results = evaluate(tiny_model_dir("gpt2"), "--text", text_file, *given, *CUT)
    names, hashes = ([result["plan"][key] for result in results] for key in ("name", "hash"))
    assert names[:2] == ["settled", "settled (one.json)"]
    assert names[2:4] == [f"settled (two.json) {hash[:8]}" for hash in hashes[2:4]]
    assert names[4] == "paper"


def test_a_plan_file_called_dense_has_its_row(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], text_file: Path, plan_file: Callable[..., Path]
) -> None:
    impostor = plan_file("dense.json", halting=FORCED)
    outcome = cli("eval", tiny_model_dir("gpt2"), "--text", text_file, "--plan", impostor, *CUT)
    for table in outcome.out.split("\n\n")[1:4]:
        assert " ".join(rows(table)) == "plan dense dense (dense.json)"  # a long name may take two lines


@pytest.mark.parametrize("name", ["a[/b]", "[b]"])
def test_plan_names_are_printed_literally(
    cli: Callable[..., Outcome],
    tiny_model_dir: Callable[[str], Path],
    text_file: Path,
    plan_file: Callable[..., Path],
    name: str,
) -> None:
    odd = plan_file("odd.json", name=name, halting=FORCED)
    outcome = cli("eval", tiny_model_dir("gpt2"), "--text", text_file, "--plan", odd, *CUT)
    assert f"\n{name} " in outcome.out
