"""Documents that can be checked are: the help page, the README's commands, and links between pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quicksilver.core.sources import embedded_models
from quicksilver.measure.demo import ARTICLES
from quicksilver.plan import PRESETS
from quicksilver.plan.presets import calibrated_plans
from scripts.cli_docs import render
from tests import tolerances

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def readme_commands() -> list[str]:
    """The lines of the README's shell blocks that call the program."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix(".venv/bin/") for line in lines if re.match(r"(\.venv/bin/)?quicksilver ", line)]


def test_the_help_page_is_current() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == render(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "examples").glob("*.py"))], ids=lambda p: p.name)
def test_pages_and_examples_use_public_names(page: Path) -> None:
    assert "quicksilver.core" not in page.read_text()


def test_the_kernels_page_states_the_tolerances() -> None:
    page = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    assert f"{tolerances.KERNEL_LOGITS:g} for any logit (`KERNEL_LOGITS`" in page
    assert f"{tolerances.KERNEL_LOSS:g} nats for a mean loss (`KERNEL_LOSS`)" in page


def test_the_plans_page_names_every_preset() -> None:
    page = (ROOT / "docs" / "plans.md").read_text().split("## Presets")[1]
    for name in (*PRESETS, *calibrated_plans()):
        assert f"`{name.rpartition('/')[2]}`" in page


def test_the_readme_shows_commands() -> None:
    assert len(readme_commands()) >= 4


def in_small(words: list[str]) -> list[str]:
    """Return a command on fewer tokens, in shorter windows where it does not choose them for a prompt's sake."""
    match words[0]:
        case "demo":
            return [*words, "--max-tokens", "100"]
        case "eval" if "--context" in words:
            return [*words, "--max-tokens", "1100"]
        case "eval":
            return [*words, "--max-tokens", "120", "--context", "64"]
        case "calibrate":
            few = ("--trials", "2", "--search-tokens", "128", "--context", "32", "--mechanisms", "kv")
            return [*words, *few]
    return words


@pytest.mark.slow
def test_readme_commands_run(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one folder, as a reader would."""
    if not embedded_models():
        pytest.skip("this checkout holds no embedded model")
    articles = sorted(ARTICLES.glob("*.txt"))
    for name, chosen in (("book.txt", articles[::2]), ("other.txt", articles[1::2])):
        (tmp_path / name).write_text("".join(path.read_text()[:1200] for path in chosen))
    monkeypatch.chdir(tmp_path)
    for line in readme_commands():
        arguments, _, output = line.partition(">")
        result = cli(*in_small(shlex.split(arguments, comments=True)[1:]))
        assert result.status == 0, (line, result.err)
        if output.strip():
            (tmp_path / output.strip()).write_text(result.out)


def test_readme_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not embedded_models():
        pytest.skip("this checkout holds no embedded model")
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    small = snippet.replace("GPT2Config()", "GPT2Config(n_layer=2, n_embd=32, n_head=2)")
    exec(compile(small, "README.md", "exec"), {})
    assert "mean depth" in capsys.readouterr().out
