"""Setting up by `make`: what a machine lacks is said in one line, before anything is made."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import HANGS

ROOT = Path(__file__).resolve().parents[2]
MACHINES = {
    "an old Python": ('[ "$1" = --version ] && echo Python 3.9.2 || exit 1', "is Python 3.9.2: Python 3.11 or newer"),
    "no ensurepip": ('case "$2" in *ensurepip*) exit 1;; esac', "lacks venv or ensurepip (Debian, Ubuntu: apt install"),
}
NO_COMPILER = """[ "$2" = venv ] || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\\nexit 0\\n' > "$3/bin/pip"
printf '#!/bin/sh\\nexit 1\\n' > "$3/bin/python"  # has no quicksilver.ops._native
chmod +x "$3/bin/pip" "$3/bin/python"
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make(target: str, python: str | Path, venv: Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", target, f"PYTHON={python}", f"VENV={venv}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=False)


def fake_python(folder: Path, script: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize(("script", "message"), MACHINES.values(), ids=list(MACHINES))
def test_a_python_that_will_not_do(tmp_path: Path, target: str, script: str, message: str) -> None:
    done = make(target, fake_python(tmp_path, script), tmp_path / "venv")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[0]
    assert not (tmp_path / "venv").exists()


def test_no_python(tmp_path: Path) -> None:
    done = make("demo", "python-of-nowhere", tmp_path / "venv")
    assert done.stderr.startswith("There is no python-of-nowhere: Python 3.11 or newer")


def test_no_compiler_is_a_note(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    done = make(str(venv / ".installed"), fake_python(tmp_path, NO_COMPILER), venv)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Note: there are no compiled kernels: no C++17 compiler or no Python headers")
    assert "skipped" in done.stderr


def test_the_readme_opens_with_what_does_everything() -> None:
    block = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert [line.split("#")[0].strip() for line in block[1].splitlines()] == ["make demo", "make test"]
