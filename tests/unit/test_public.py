"""The public surface: names, an inert import, and help that does not load PyTorch."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys

import pytest

import quicksilver


def test_all_names_exist_and_are_all() -> None:
    assert quicksilver.__all__ == ["Plan", "__version__", "accelerate", "errors", "load", "load_tokenizer", "rules"]
    assert all(getattr(quicksilver, name) is not None for name in quicksilver.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = quicksilver.nonsense


@pytest.mark.parametrize(
    "code",
    [
        "import quicksilver",
        "import quicksilver.plan",
        "import quicksilver.integrations",
        "import sys; sys.argv = ['quicksilver', 'plan', 'show', 'paper']\n"
        "from quicksilver.cli.main import cli; cli.main(['-h'], standalone_mode=False)",
    ],
)
def test_import_is_inert(code: str) -> None:
    check = "\nimport sys; assert not {'transformers', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code + check], check=True, capture_output=True)


def test_the_plug_in_names_the_package_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, "quicksilver.integrations.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'quicksilver-llm\[lm-eval\]'"):
        importlib.import_module("quicksilver.integrations.lm_eval")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("quicksilver.integrations.lm_eval", run_name="__main__")
    assert stop.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("quicksilver: "))
    assert line.startswith("quicksilver: error: lm-evaluation-harness cannot be imported")
