"""`quicksilver calibrate` on tiny models: a plan that `eval` confirms, the same again after anything, or a refusal."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quicksilver.calibrate.scoring import Scorer
from quicksilver.plan import Plan
from tests.e2e.conftest import Outcome, assert_refusal

Cli = Callable[..., Outcome]
WORDS = ("river", "hill", "sea", "stone", "bend", "the", "a", "of", "nobody", "runs", "to", "rises", "in")
FAST = ("--context", 32, "--search-tokens", 192, "--trials", 6)
LOOSE = ("--max-delta-nll", 0.4)
FRONTIER = (".json", ".png", ".svg")


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text of about 1,900 tokens of the tiny tokenizer."""
    path, words, draw = tmp_path / "book.txt", WORDS, random.Random(0)
    path.write_text(" ".join(draw.choice(words) for _ in range(450)), encoding="utf-8")
    return path


def files_of(folder: Path, name: str = "mine") -> set[str]:
    """Return the names of what a calibration wrote."""
    return {each.name for each in folder.iterdir() if each.name.startswith(name)}


@pytest.mark.parametrize(("family", "mechanisms"), [("llama", "halting,kv,precision"), ("gpt2", "halting,kv")])
def test_a_plan_is_found_and_eval_confirms_it(
    cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path, family: str, mechanisms: str
) -> None:
    target, folder = tmp_path / "mine.json", tiny_model_dir(family)
    done = cli(
        "calibrate", folder, "--text", book, *LOOSE, *FAST, "--trials", 14, "--mechanisms", mechanisms, "-o", target
    )
    assert done.status == 0, done.err
    assert done.said == []
    check_table(done.out, "precision" in mechanisms)
    plan = Plan.load(target)
    assert not plan.is_dense
    assert not plan.is_recipe
    tensors = {"mine.safetensors"} if plan.tensors is not None else set()
    frontier = {f"mine.frontier{ending}" for ending in FRONTIER}
    assert files_of(tmp_path) == {"mine.json", "mine.work", *frontier, *tensors}
    for ending in FRONTIER[1:]:
        assert (tmp_path / f"mine.frontier{ending}").stat().st_size > 1000
    found = json.loads((tmp_path / "mine.frontier.json").read_text())
    assert found["chosen"]["hash"] == plan.hash
    held = found["verification"]["held"]
    assert held["plan"]["hash"] == plan.hash
    assert held["delta"]["nll_ci95"][1] <= 0.4
    assert held["delta"]["flops_reduction"] > 0.0
    chosen = [each for each in found["candidates"] if each["plan_hash"] == plan.hash]
    assert chosen
    assert all(each["within_budget"] and each["on_frontier"] for each in chosen[:1])
    # the whole text holds the held-out part: the same work for a token, about the same loss
    rows = tmp_path / "rows.json"
    done = cli("eval", folder, "--text", book, "--context", 32, "--plan", target, "--json", rows)
    assert done.status == 0, done.err
    (row,) = json.loads(rows.read_text())
    assert row["plan"]["hash"] == plan.hash
    assert row["delta"]["flops_reduction"] == pytest.approx(held["delta"]["flops_reduction"], abs=0.05)
    assert row["delta"]["nll"] == pytest.approx(held["delta"]["nll"], abs=0.15)
    generated = cli("generate", folder, "The river", "--plan", target, "--max-new-tokens", 3)
    assert generated.status == 0, generated.err


def check_table(out: str, quantized: bool) -> None:
    """Names are whole and on lines of their own, in 80 columns, and it is said what savings are against."""
    table = out[out.index("best inside the budget") :].splitlines()[1:]
    above, below = (" ".join(line.split()) for line in table[:2])
    assert above == "lost at most FLOPs in the bitops weights KV"
    assert below in [f"group [{unit}] [95 % CI] saved layers saved saved saved" for unit in ("nats", "ppl")]
    assert max(map(len, table)) <= 80
    assert "…" not in out
    for name in ("paper, as published", "together", "chosen, held out"):
        (line,) = (line for line in table if line.startswith(f"{name} "))
        assert len(line.removeprefix(name).split()) == 7
    said = "bitops and weights: of it quantized, all 8 bits read" in " ".join(out.split())
    assert said == quantized


def calibration(folder: Path, book: Path, target: Path) -> tuple[object, ...]:
    options = ("--mechanisms", "halting,kv", "--trials", 10)
    return ("calibrate", folder, "--text", book, *LOOSE, *FAST, *options, "-o", target)


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """What calibrations of this module gave that need not be run again."""
    return {}


@pytest.fixture
def whole(cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path, known: dict[str, Any]) -> tuple[bytes, int]:
    """The plan of a calibration that nothing interrupts, as the file mine.json, and how many candidates it scored."""
    if "whole" not in known:
        target = tmp_path / "whole" / "mine.json"
        target.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            scored = count_scores(patch)
            assert cli(*calibration(tiny_model_dir("llama"), book, target)).status == 0
        known["whole"] = target.read_bytes(), len(scored)
    return known["whole"]


def count_scores(patch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[Scorer]:
    """Return a list that grows with each candidate scored; at one of them the user gives up."""
    score, scored = Scorer.score, []

    def counted(self: Scorer, *args: Any, **options: Any) -> Any:
        scored.append(self)
        if len(scored) == stop_at:
            raise KeyboardInterrupt
        return score(self, *args, **options)

    patch.setattr(Scorer, "score", counted)
    return scored


@pytest.mark.slow
def test_the_same_seed_gives_the_same_plan(
    cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path, whole: tuple[bytes, int]
) -> None:
    target = tmp_path / "mine.json"
    assert cli(*calibration(tiny_model_dir("llama"), book, target)).status == 0
    assert target.read_bytes() == whole[0]
    assert Plan.load(target).tensors is not None  # their digest is in the plan


@pytest.mark.slow
def test_the_same_seed_gives_the_same_candidates(cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        target = tmp_path / name / "mine.json"
        target.parent.mkdir()
        options = ("--text", book, *LOOSE, *FAST, "--mechanisms", "kv", "--trials", 8, "--seed", seed)
        assert cli("calibrate", tiny_model_dir("llama"), *options, "-o", target).status in (0, 3)
        frontier = json.loads(target.with_suffix(".frontier.json").read_text())
        found.append([(each["candidate"], each["plan_hash"], each["delta"]) for each in frontier["candidates"]])
    assert found[0] == found[1]
    assert found[0] != found[2]  # the last ones are Optuna's


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.7, 1.0])
def test_after_an_interruption_the_same_command_goes_on(
    cli: Cli,
    tiny_model_dir: Any,
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[bytes, int],
    share: float,
) -> None:
    """While the published rules are tuned, while candidates are searched, at the last of all: the same plan."""
    target, (plan, count) = tmp_path / "mine.json", whole
    scored = count_scores(monkeypatch, int(share * count))
    stopped = cli(*calibration(tiny_model_dir("llama"), book, target))
    assert (stopped.status, stopped.said) == (130, ["quicksilver: interrupted"])
    assert files_of(tmp_path) == {"mine.work"}
    assert cli(*calibration(tiny_model_dir("llama"), book, target)).status == 0
    assert target.read_bytes() == plan
    assert len(scored) == count + 1  # nothing was scored twice but what was interrupted


@pytest.mark.slow
def test_a_killed_process_goes_on_too(
    cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path, whole: tuple[bytes, int]
) -> None:
    target = tmp_path / "mine.json"
    words = [str(word) for word in calibration(tiny_model_dir("llama"), book, target)]
    command = [sys.executable, "-m", "quicksilver.cli.main", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    study, deadline = tmp_path / "mine.work" / "study.log", time.monotonic() + 60.0
    while time.monotonic() < deadline and process.poll() is None:
        if study.is_file() and study.read_bytes().count(b'"op_code":6') >= 3:  # a few trials are told
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    (tmp_path / "mine.work" / "study.log.lock").unlink(missing_ok=True)  # or Optuna waits half a minute for its holder
    assert cli(*calibration(tiny_model_dir("llama"), book, target)).status == 0
    assert target.read_bytes() == whole[0]


def test_a_hopeless_budget_gives_the_dense_plan(cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.json"
    options = ("--max-delta-ppl", 1e-9, *FAST, "--mechanisms", "halting")
    done = cli("calibrate", tiny_model_dir("llama"), "--text", book, *options, "-o", target)
    assert (done.status, done.said) == (3, [])
    assert "no plan held the budget" in done.out
    assert Plan.load(target) == Plan.dense()
    assert files_of(tmp_path) == {"mine.json", "mine.work", *(f"mine.frontier{ending}" for ending in FRONTIER)}
    found = json.loads((tmp_path / "mine.frontier.json").read_text())
    assert found["verification"]["held"] is None
    assert found["leave_one_out"] == []


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, 20, 40])
def test_without_a_text_one_is_sampled_from_the_model(
    cli: Cli, tiny_model_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: int | None
) -> None:
    monkeypatch.setattr("quicksilver.cli.calibration._FIT_TOKENS", 1500)
    target, context = tmp_path / "mine.json", 32 if prompt != 40 else 64
    options = () if prompt is None else ("--prompt", prompt, "--mechanisms", "fusion,kv")
    done = cli(
        "calibrate",
        tiny_model_dir("llama"),
        "--max-delta-nll",
        0.5,
        *FAST,
        "--context",
        context,
        *options,
        "-o",
        target,
    )
    assert done.status in (0, 3), done.err
    (line,) = (line for line in done.err.splitlines() if line.startswith("no text was given: "))
    assert line.endswith("tokens are sampled from the model (seed 0)")
    assert done.said == []
    found = json.loads((tmp_path / "mine.frontier.json").read_text())
    assert found["text"] == "text sampled from the model (seed 0)"
    assert found["protocol"]["prompt"] == prompt
    assert found["parts"]["search_tokens"] > 90


@pytest.mark.slow
def test_documents_are_calibrated_on_too(cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path) -> None:
    documents, target, text = tmp_path / "documents.jsonl", tmp_path / "mine.json", book.read_text()
    pieces = [text[i : i + size] for i, size in zip(range(0, 1800, 30), [30, 3, 12] * 20, strict=True)]
    documents.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    done = cli(
        "calibrate", tiny_model_dir("gpt2"), "--documents", documents, *LOOSE, *FAST, "--mechanisms", "halting,kv",
        "-o", target,
    )  # fmt: skip
    assert done.status in (0, 3), done.err
    assert done.said == []
    found = json.loads((tmp_path / "mine.frontier.json").read_text())
    assert found["parts"]["fit_tokens"] > 200


@pytest.mark.slow
def test_a_time_limit_ends_it(
    cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a second whenever it is looked at: once to begin, and before each trial."""
    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    for module in ("pipeline", "trials"):
        monkeypatch.setattr(f"quicksilver.calibrate.{module}.time", clock)
    options = ("--text", book, *LOOSE, *FAST, "--trials", 100000, "--time-limit", 8, "--mechanisms", "kv")
    done = cli("calibrate", tiny_model_dir("llama"), *options, "-o", tmp_path / "mine.json")
    assert done.status in (0, 3), done.err
    study = (tmp_path / "mine.work" / "study.log").read_bytes()
    assert 1 <= study.count(b'"op_code":6') < 20  # told trials, those without one mechanism among them


@pytest.mark.slow
def test_seconds_can_be_saved(cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path) -> None:
    options = ("--text", book, *LOOSE, *FAST, "--mechanisms", "halting", "--minimise", "seconds")
    done = cli("calibrate", tiny_model_dir("llama"), *options, "-o", tmp_path / "mine.json")
    assert done.status in (0, 3), done.err


@pytest.mark.slow
def test_what_was_written_is_overwritten_when_asked(cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.json"
    target.write_text("old")
    options = ("--max-delta-ppl", 1e-9, *FAST, "--mechanisms", "kv", "--text", book)
    assert cli("calibrate", tiny_model_dir("llama"), *options, "-o", target, "--force").status == 3
    assert Plan.load(target) == Plan.dense()


BAD = [
    ((), ("--max-delta-ppl", "--max-delta-nll")),
    (("--max-delta-ppl", 0.1, "--max-delta-nll", 0.1), ("--max-delta-ppl", "--max-delta-nll")),
    (("--max-delta-nll", 0), ("--max-delta-nll",)),
    (("--max-delta-ppl", "nan"), ("--max-delta-ppl", "nan")),
    (("--max-delta-nll", "inf"), ("--max-delta-nll", "inf")),
    (("--max-delta-ppl", "little"), ("--max-delta-ppl", "little")),
    ((*LOOSE, "--mechanisms", "halting,magic"), ("--mechanisms", "magic", "precision")),
    ((*LOOSE, "--mechanisms", ","), ("--mechanisms",)),
    ((*LOOSE, "--mechanisms", "fusion"), ("fusion", "--prompt")),
    ((*LOOSE, "--mechanisms", "kv,fusion"), ("fusion", "--prompt")),
    ((*LOOSE, "--context", 65), ("--context 65", "64")),
    ((*LOOSE, "--context", 7), ("--context", "7")),
    ((*LOOSE, "--context", 64), ("book.txt", "windows", "--context")),
    ((*LOOSE, "--prompt", 64), ("prompt", "63")),
    ((*LOOSE, "--prompt", 0), ("--prompt", "0")),
    ((*LOOSE, "--trials", 0), ("--trials", "0")),
    ((*LOOSE, "--time-limit", 0), ("--time-limit", "0")),
    ((*LOOSE, "--time-limit", "nan"), ("--time-limit", "nan")),
    ((*LOOSE, "--seed", -1), ("--seed", "-1")),
    ((*LOOSE, "--search-tokens", 3), ("--search-tokens", "3")),
    ((*LOOSE, "--minimise", "joules"), ("--minimise", "joules", "flops")),
    ((*LOOSE, "--device", "abacus"), ("abacus",)),
]


@pytest.mark.parametrize(("options", "named"), BAD, ids=lambda value: " ".join(map(str, value))[:50])
def test_bad_options(
    refused: Callable[..., str], tiny_model_dir: Any, text_file: Path, tmp_path: Path, options: Any, named: Any
) -> None:
    target = tmp_path / "results" / "mine.json"
    target.parent.mkdir()
    refused("calibrate", tiny_model_dir("llama"), "--text", text_file, *options, "-o", target, names=named)


@pytest.mark.parametrize("content", [b"", b"Too short.", b"Latin-1: caf\xe9 au lait"], ids=["empty", "short", "latin"])
def test_bad_texts(refused: Callable[..., str], tiny_model_dir: Any, tmp_path: Path, content: bytes) -> None:
    text, target = tmp_path / "bad.txt", tmp_path / "results" / "mine.json"
    target.parent.mkdir()
    text.write_bytes(content)
    refused("calibrate", tiny_model_dir("llama"), "--text", text, *LOOSE, "-o", target, names=("bad.txt",))
    missing = tmp_path / "missing.txt"
    refused("calibrate", tiny_model_dir("llama"), "--text", missing, *LOOSE, "-o", target, names=(missing,))


def test_a_missing_model(refused: Callable[..., str], text_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "results" / "mine.json"
    target.parent.mkdir()
    refused("calibrate", tmp_path / "no-model", "--text", text_file, *LOOSE, "-o", target, names=("no-model",))


def test_bad_outputs(cli: Cli, tiny_model_dir: Any, book: Path, tmp_path: Path) -> None:
    old = tmp_path / "mine.json"
    old.write_text("old")
    (tmp_path / "taken.work").write_text("a file")
    (tmp_path / "model.safetensors").write_text("weights of a model")
    folder = tmp_path / "folder.json"
    folder.mkdir()
    command = ("calibrate", tiny_model_dir("llama"), "--text", book, *LOOSE, *FAST)
    before = sorted(tmp_path.iterdir())
    for target, *named in (
        (old, "mine.json", "exists", "--force"),
        (tmp_path / "nowhere" / "mine.json", "nowhere", "folder"),
        (tmp_path / "mine.txt", "mine.txt", ".json"),
        (folder, "folder.json"),
        (tmp_path / "taken.json", "taken.work"),
        (tmp_path / "model.json", "model.safetensors", "--force"),
    ):
        assert_refusal(cli(*command, "-o", target), *named)
    assert old.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before
