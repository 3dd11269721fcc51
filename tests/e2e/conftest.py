"""Models and plans to be run, good and spoilt, and the command line inside the test process or as one of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import quicksilver
from quicksilver import errors
from quicksilver.cli.main import main
from tests import HANGS, tiny

SENTENCES = "The river rises in the hills and runs to the sea. Nobody has counted its bends! "
FORCED = {"rule": {"type": "forced", "depths": [1, 3, 2, 4]}, "min_layer": 1, "protect_first": 0}
CUT = ("--context", 32, "--stride", 16)
RANDOM = {"rule": {"type": "random", "probability": 0.4}, "min_layer": 1, "protect_first": 2}
DEEP, LONG_NUMBER = "[" * 100_000, "1" * 5000  # JSON that parsers give up on
NO_SERVER = "http://127.0.0.1:9"  # the discard port: refuses at once


@dataclass(frozen=True)
class Outcome:
    """What a command printed and its exit status."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines on stderr that are the program's own."""
        return own_lines(self.err)


def own_lines(err: str) -> list[str]:
    """Return the lines on stderr that are ours: notes, warnings, errors, tracebacks, click's answers.

    What other packages say there is let be, and so is progress, which is shown where something takes long.
    """
    starts = ("quicksilver: ", "Usage: ", "Error: ")
    within = ("Traceback", *(name for name in vars(errors) if name.endswith("Warning")))
    return [line for line in err.splitlines() if line.startswith(starts) or any(mark in line for mark in within)]


@pytest.fixture(params=tiny.LAYOUTS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Transformers' model and ours over the same weights, dense."""
    reference = tiny.model(request.param)
    return reference, quicksilver.accelerate(reference)


@pytest.fixture
def model() -> Any:
    """A tiny dense model."""
    return quicksilver.accelerate(tiny.model("llama"))


@pytest.fixture
def folder(tiny_model_dir: Callable[[str], Path]) -> Path:
    """A good model."""
    return tiny_model_dir("llama")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of 240 characters, 240 tokens of the tiny tokenizer."""
    path = tmp_path / "book.txt"
    path.write_text(SENTENCES * 3, encoding="utf-8")
    return path


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that runs `quicksilver ARGS` in this process; an exception here is a traceback there."""

    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # or click names the program after pytest

    def run(*args: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["quicksilver", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return run


@pytest.fixture
def refused(cli: Callable[..., Outcome], tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a command which must be refused, checks how, and returns the error's line.

    Exit status 2, nothing on stdout, one line of ours on stderr that holds each of `names`, and no file written.
    """

    def check(*args: object, names: tuple[object, ...] = (), stdin: bytes = b"") -> str:
        results = tmp_path / "results"
        results.mkdir(exist_ok=True)
        if args[0] == "eval" and "--json" not in args:
            args = (*args, "--json", results / "out.json")
        outcome = cli(*args, stdin=stdin)
        assert_refusal(outcome, *names)
        assert list(results.iterdir()) == []
        return outcome.said[0]

    return check


def assert_refusal(outcome: Outcome, *names: object) -> None:
    """Check the exit status and the one line of a refusal, which must hold each of `names`."""
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert len(outcome.said) == 1, outcome.err
    assert outcome.said[0].startswith("quicksilver: error: ")
    for name in names:
        assert str(name) in outcome.said[0], outcome.err


def run_process(*args: object, **env: str) -> Outcome:
    """Run `python -m quicksilver.cli.main ARGS` as a process of its own, one thread."""
    command = [sys.executable, "-m", "quicksilver.cli.main", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANGS, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


class ModelFolder:
    """A copy of a tiny model's folder, to be spoilt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "model.safetensors"

    def edit_config(self, **changes: Any) -> Path:
        """Change keys of config.json; a value of None takes the key out."""
        config_file = self.path / "config.json"
        config = {**json.loads(config_file.read_text()), **changes}
        config_file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return self.path

    def edit_weights(self, change: Callable[[dict[str, Any]], object]) -> Path:
        """Apply a function to the state dict in place and write it back."""
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, {"format": "pt"})
        return self.path


@pytest.fixture
def model_copy(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[[str], ModelFolder]:
    """Return a function from a family to a private copy of its tiny model."""

    def copy(family: str = "llama") -> ModelFolder:
        return ModelFolder(Path(shutil.copytree(tiny_model_dir(family), tmp_path / f"copy-{family}")))

    return copy


@pytest.fixture
def plan_file(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a plan of version 1 with the given keys."""

    def write(file: str = "mine.json", **body: Any) -> Path:
        path = tmp_path / file
        path.write_text(json.dumps({"version": 2, **body}), encoding="utf-8")
        return path

    return write


class Hub:
    """A server in the hub's place that hangs up on whoever calls, and counts the calls."""

    def __init__(self, server: socket.socket) -> None:
        self.endpoint, self.calls = f"http://127.0.0.1:{server.getsockname()[1]}", 0
        self._server = server
        Thread(target=self._hang_up, daemon=True).start()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):  # the server is closed
            while True:
                caller, _ = self._server.accept()
                self.calls += 1
                caller.close()


@pytest.fixture
def dead_hub() -> Iterator[Hub]:
    """A hub that answers nobody, for processes whose HF_ENDPOINT is its `endpoint`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Hub(server)
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def no_hub(dead_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The same for the hub's client in this process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", dead_hub.endpoint)
    return dead_hub


def no_constants(name: str) -> None:
    """Refuse what Python's json writes and JSON does not know: NaN and infinities."""
    raise ValueError(f"{name} is not JSON")


@pytest.fixture
def evaluate(cli: Callable[..., Outcome], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that runs `eval` and returns its JSON."""

    def run(*args: object) -> list[dict[str, Any]]:
        path = tmp_path / "out.json"
        outcome = cli("eval", *args, "--json", path)
        assert outcome.status == 0, outcome.err
        return json.loads(path.read_text(), parse_constant=no_constants)

    return run
