"""Build the kernels with the address and undefined behaviour sanitizers, and run their tests against that build.

What is installed is not touched: the build is loaded in its place by the process that runs the tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
NAME = "quicksilver.ops._native"
TESTS = ("tests/ops", "tests/semantics/test_kernels.py", "tests/semantics/test_spans.py")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_NUM_THREADS": "1",
}


def build() -> Path:
    """Return the extension, built anew where a source changed."""
    configure = [
        "cmake",
        "-S",
        ROOT / "csrc",
        "-B",
        BUILD,
        "-DQUICKSILVER_SANITIZE=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    for command in (configure, ["cmake", "--build", BUILD]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (extension,) = BUILD.glob("_native*.so")
    return extension


def runtimes() -> str:
    """Return the sanitizers' libraries, which must be loaded before anything else."""
    compiler = os.environ.get("CXX", "c++")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return ":".join(found)


def run_tests(extension: str, arguments: list[str]) -> int:
    """Run pytest in this process with the extension in the place of the installed one."""
    import pytest

    spec = importlib.util.spec_from_file_location(NAME, extension)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return int(pytest.main(["--capture=sys", *arguments]))  # what a sanitizer writes as it ends the process is seen


def main() -> int:
    """Build, then run the tests in a process that has the sanitizers."""
    extension = build()
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": runtimes()}
    command = [sys.executable, "-m", "scripts.sanitize", str(extension), *(sys.argv[1:] or TESTS)]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(run_tests(given[0], given[1:]) if given[:1] and given[0].endswith(".so") else main())
