"""Documents that can be checked are: the help page, commands, Python and plans in pages, and links between them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quicksilver.core.sources import embedded_models
from quicksilver.families.names import FAMILIES
from quicksilver.measure.demo import ARTICLES
from quicksilver.ops import native
from quicksilver.plan import PRESETS, Plan
from quicksilver.plan.presets import calibrated_plans
from scripts.cli_docs import render
from tests import tolerances

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


SOURCES = ("src", "csrc", "tests", "examples")
GUIDES = ("README.md", "docs/usage.md")
"""Pages whose commands and Python run as they stand."""


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks that call the program."""
    return [line for line in "".join(blocks(page, "sh")).splitlines() if line.startswith("quicksilver ")]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_help_page_is_current() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == render(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]*))?\)", prose(page)):
        if target.startswith("http"):
            continue
        linked = page if target == "" else page.parent / target
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_files_that_pages_name_are_there(page: Path) -> None:
    for name in re.findall(r"`([\w/]+\.(?:py|toml|cpp|h|md))`", prose(page)):
        found = any(path.match(name) for folder in SOURCES for path in (ROOT / folder).rglob(Path(name).name))
        assert found or (ROOT / name).exists() or "NAME" in name, f"{page.name} names {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_plans_in_the_pages_are_plans() -> None:
    rule = {"type": "relative", "threshold": 0.99}
    for block in blocks("docs/plans.md", "json"):
        if block.startswith("{"):
            plan = json.loads(block.replace('{"type": "steady", "threshold": 0.99}', json.dumps(rule)))
            Plan.from_dict(plan)


def test_the_families_page_names_every_family() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in page] == []
    assert (ROOT / "src" / "quicksilver" / "families" / "olmo2.py").read_text() in page


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


@pytest.mark.parametrize("page", GUIDES)
def test_guides_show_commands(page: str) -> None:
    assert len(commands(page)) >= 4


def in_small(words: list[str]) -> list[str]:
    """Return a command on fewer tokens, in shorter windows where it does not choose them for a prompt's sake."""
    match words[0]:
        case "demo":
            return [*words, "--max-tokens", "100"]
        case "eval" if "--prompt" in words:
            return [*words, "--max-tokens", "1100"]
        case "eval":
            return [*words, "--max-tokens", "120", "--context", "64"]
        case "calibrate":
            few = ("--trials", "2", "--search-tokens", "128", "--context", "32", "--mechanisms", "kv")
            return [*words, *few]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES)
def test_commands_run(page: str, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one folder, as a reader would."""
    if not embedded_models():
        pytest.skip("this checkout holds no embedded model")
    articles = sorted(ARTICLES.glob("*.txt"))
    for name, chosen in (("book.txt", articles[::2]), ("other.txt", articles[1::2])):
        (tmp_path / name).write_text("".join(path.read_text()[:1200] for path in chosen))
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        arguments, _, output = line.partition(">")
        result = cli(*in_small(shlex.split(arguments, comments=True)[1:]))
        assert result.status == 0, (line, result.err)
        if output.strip():
            (tmp_path / output.strip()).write_text(result.out)


def test_the_readme_makes_its_text() -> None:
    (pattern,) = re.findall(r"^cat (\S+) > book.txt", "".join(blocks("README.md", "sh")), re.MULTILINE)
    assert sorted(ROOT.glob(pattern)) == sorted(ARTICLES.glob("*.txt"))


@pytest.mark.parametrize("page", GUIDES)
def test_python_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not embedded_models():
        pytest.skip("this checkout holds no embedded model")
    (snippet,) = blocks(page, "python")
    small = snippet.replace("GPT2Config()", "GPT2Config(n_layer=2, n_embd=32, n_head=2)")
    exec(compile(small, page, "exec"), {})
    assert "mean depth" in capsys.readouterr().out


def test_the_families_page_compares_with_transformers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = next(block for block in blocks("docs/families.md", "python") if "difference" in block)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "families.md", "exec"), {})
    difference, backend = capsys.readouterr().out.splitlines()
    assert float(difference.split()[-1]) < tolerances.LOGITS[torch.float32]
    assert (backend == "native None") == native.is_available()
