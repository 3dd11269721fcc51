"""What needs no model answers without PyTorch and all else that takes seconds to import: lists, plans, help, refusals.

Tested by what is imported, not by seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quicksilver.cli.main import _COMMANDS
from quicksilver.plan import PRESETS
from quicksilver.plan.presets import calibrated_plans
from quicksilver.rules import Shortcut
from tests import HANGS
from tests.e2e.conftest import NO_SERVER, Outcome, own_lines
from tests.engines import shortcut_plan

SLOW = ("torch", "transformers", "numpy", "matplotlib", "optuna", "scipy", "pandas", "datasets")
PROGRAM = f"""
import contextlib, io, json, sys
from quicksilver.cli.main import main
for arguments in json.load(sys.stdin):
    sys.argv, out, err, status = ["quicksilver", *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
    slow = [name for name in {SLOW} if name in sys.modules]
    print(json.dumps([arguments, status, err.getvalue(), slow]))
    if slow:
        break  # all that follow would be blamed
"""

HELP = [[*command, "--help"] for command in ([], *([name] for name in _COMMANDS))]
HELP += [["plan", name, "--help"] for name in ("list", "show", "validate", "fit")]
PLANS = [["plan", verb, name] for verb in ("show", "validate") for name in (*PRESETS, *calibrated_plans())]


def run_all(commands: list[list[str]]) -> list[tuple[int, list[str]]]:
    """Run commands in one fresh process; check that none imports what is slow; return each one's status and lines."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_ENDPOINT": NO_SERVER},
        timeout=HANGS,
        check=False,
    )
    assert (done.returncode, own_lines(done.stderr)) == (0, [])
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(command, slow) for command, _, _, slow in results if slow] == []
    assert len(results) == len(commands)
    return [(status, own_lines(err)) for _, status, err, _ in results]


def test_help_lists_and_presets() -> None:
    for status, said in run_all([["--version"], ["models"], ["eval", "--explain"], ["plan", "list"], *HELP, *PLANS]):
        assert (status, said) == (0, [])


def test_a_plan_with_tensors_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    shortcut_plan(Shortcut(1, "mlp", 0.5)).save(path)
    assert run_all([["plan", verb, str(path)] for verb in ("show", "validate")]) == [(0, [])] * 2


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-3] + b"\x01" + path.read_bytes()[-2:]),
    "not finite": lambda path: path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x7f"),
    "rubbish": lambda path: path.write_bytes(b"rubbish"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_tensors_beside_a_plan(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "mine.json"
    shortcut_plan(Shortcut(1, "mlp", 0.5)).save(path)
    damage(tmp_path / "mine.safetensors")
    ((status, (line,)),) = run_all([["plan", "validate", str(path)]])
    assert status == 2
    assert line.startswith("quicksilver: error: ")


def test_refusals(tiny_model_dir: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    model, text, new = str(tiny_model_dir("llama")), str(text_file), str(tmp_path / "new.json")
    bad = {name: tmp_path / f"{name}.json" for name in ("cut", "field", "rule")}
    bad["cut"].write_text("{")
    bad["field"].write_text('{"version": 2, "haltin": {}}')
    bad["rule"].write_text('{"version": 2, "halting": {"rule": {"type": "drift", "threshold": "low"}}}')
    latin, lines = tmp_path / "latin.txt", tmp_path / "lines.jsonl"
    latin.write_bytes(b"caf\xe9")
    lines.write_text('{"body": 1}\n')
    nowhere, taken, blocked = str(tmp_path / "nowhere" / "x"), str(text_file), str(tmp_path / "taken.work")
    Path(blocked).write_text("a file")
    run, fit, loss = ["eval", model, "--text", text], ["plan", "fit", model], ["--max-delta-nll", "0.1"]
    calibrate = ["calibrate", model, "--text", text]
    refused = [
        ["nosuch"],
        ["plan", "nosuch"],
        ["plan", "show", "papper"],
        ["plan", "show", "mild"],
        *(["plan", verb, str(path)] for verb in ("show", "validate") for path in (*bad.values(), nowhere)),
        *([*command, "--plan", str(plan)] for command in (run, ["generate", model, "x"]) for plan in bad.values()),
        ["generate", model, "x", "--plan", "papper"],
        ["generate", model, "x", "--plan", "mild"],
        ["generate", model, "x", "--top-k", "5"],
        ["generate", model, "x", "--temperature", "-1"],
        ["generate", model, "x", "--temperature", "1", "--top-p", "2"],
        ["generate", model, "x", "--max-new-tokens", "0"],
        ["generate", model, "x", "--device", "abacus"],
        ["generate", model, "\udce9"],
        ["generate", nowhere, "x"],
        ["generate", str(tmp_path), "x"],
        ["generate", "no-such-model", "x"],
        ["generate", "someone/some-model", "x"],
        ["generate", "not a hub id", "x"],
        ["generate", "", "x"],
        ["generate", model],
        ["eval", model],
        ["eval", model, "--text", nowhere],
        ["eval", model, "--text", str(latin)],
        ["eval", model, "--documents", nowhere],
        ["eval", model, "--documents", str(lines)],
        ["eval", model, "--dataset", "wikitext-104"],
        ["eval", nowhere, "--text", text],
        ["eval", text, "--text", text],
        [*run, "--plan", "papper"],
        [*run, "--calibration", text],
        [*run, "--plan", "channel-5bit", "--calibration", nowhere],
        [*run, "--json", nowhere],
        [*run, "--mode", "guess"],
        [*run, "--dtype", "int8"],
        [*run, "--device", "mps"],
        [*run, "--kernels", "fast"],
        [*run, "--plam", "paper"],
        [*run, "--context", "1"],
        [*run, "--context", "32", "--prompt", "32"],
        [*run, "--context", "32", "--stride", "33"],
        [*run, "--context", "32", "--prompt", "20", "--stride", "13"],
        [*run, "--context", "32", "--max-tokens", "20"],
        [*fit, "channel-5bit", "-o", nowhere],
        [*fit, "channel-5bit", "-o", taken],
        [*fit, "channel-5bit", "-o", new, "--calibration", nowhere],
        [*fit, "settled", "-o", new],
        [*fit, "papper", "-o", new],
        ["plan", "fit", nowhere, "channel-5bit", "-o", new],
        ["quantize", model, "-o", taken],
        ["quantize", model, "-o", nowhere],
        ["quantize", model, "-o", new, "--calibration", nowhere],
        ["quantize", model, "-o", new, "--calibration-tokens", "9"],
        ["quantize", model, "-o", new, "--device", "tpu"],
        ["quantize", nowhere, "-o", new],
        [*calibrate, "-o", new],
        [*calibrate, *loss, "-o", nowhere],
        [*calibrate, *loss, "-o", str(bad["cut"])],
        [*calibrate, *loss, "-o", str(tmp_path / "mine.txt")],
        [*calibrate, *loss, "-o", str(tmp_path / "taken.json")],
        [*calibrate, *loss, "-o", new, "--work", blocked],
        [*calibrate, *loss, "-o", new, "--mechanisms", "magic"],
        [*calibrate, *loss, "-o", new, "--context", "32", "--prompt", "40"],
        ["calibrate", model, "--text", nowhere, *loss, "-o", new],
        ["calibrate", nowhere, "--text", text, *loss, "-o", new],
        ["demo", "--output", taken],
        ["demo", "--output", f"{taken}/below"],
        ["demo", "--output", ""],
        ["demo", "--model", nowhere],
        ["demo", "--max-tokens", "10"],
    ]
    if Path("/proc/self").is_dir():  # where root may write by its permissions, and nobody can
        refused += [[*run, "--json", "/proc/x"], ["quantize", model, "-o", "/proc/x"], ["demo", "--output", "/proc/x"]]
        refused += [[*fit, "channel-5bit", "-o", "/proc/x"], [*calibrate, *loss, "-o", "/proc/x.json"]]
    before = sorted(tmp_path.rglob("*"))
    for command, (status, said) in zip(refused, run_all(refused), strict=True):
        assert status == 2, command
        assert len(said) == 1, command
        assert said[0].startswith("quicksilver: error: "), command
    assert sorted(tmp_path.rglob("*")) == before


def test_a_terminal_is_told_that_a_model_is_loaded(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: tuple[Any, ...] = ("generate", tiny_model_dir("gpt2"), "x", "--max-new-tokens", 2)
    assert cli(*arguments).err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli(*arguments).said == [f"quicksilver: loading {arguments[1]} ..."]
