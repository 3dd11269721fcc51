"""Packages that bring halting rules: installed, named in a plan's JSON, run, and refused where they are broken."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from quicksilver.rules.halting.base import HALTING_RULES
from tests import HANGS
from tests.e2e.conftest import CUT, assert_refusal, own_lines, run_process

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "halting_rule"
SECTION = (ROOT / "docs" / "plans.md").read_text().split("## A rule of your own")[1].split("\n## ")[0]
STEADY = {"version": 2, "halting": {"rule": {"type": "steady", "threshold": -1.0}, "min_layer": 1}}
GOOD = "from dataclasses import dataclass\nfrom quicksilver import rules\n"
OTHER_NAME = """
@rules.halting_rule("other")
@dataclass(frozen=True)
class Other(rules.ThresholdRule):
    def decide(self, view):
        return rules.HaltDecision(view.positions < 0)
"""


def block(language: str) -> str:
    found, *_ = re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    return found


def install(target: Path, distribution: str, entries: dict[str, str], **modules: str) -> None:
    """Lay out a package as an installer would."""
    info = target / f"{distribution.replace('-', '_')}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[quicksilver.rules]", *lines, ""]))
    for name, text in modules.items():
        (target / f"{name}.py").write_text(text)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A folder into which the example is installed, from what its pyproject.toml says."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    modules = {name: (EXAMPLE / f"{name}.py").read_text() for name in project["tool"]["setuptools"]["py-modules"]}
    entries = project["project"]["entry-points"]["quicksilver.rules"]
    install(tmp_path / "site", project["project"]["name"], entries, **modules)
    return tmp_path / "site"


def plan_file(folder: Path, plan: object) -> Path:
    path = folder / "mine.json"
    path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    return path


def test_the_page_shows_the_example() -> None:
    assert block("python") == (EXAMPLE / "steady_rule.py").read_text()
    assert block("toml") in (EXAMPLE / "pyproject.toml").read_text()
    assert block("json").strip() in (EXAMPLE / "README.md").read_text()


def test_plan_commands_read_it_without_pytorch(example: Path, tmp_path: Path) -> None:
    path = plan_file(tmp_path, block("json"))
    done = run_process("plan", "validate", path, PYTHONPATH=str(example))
    assert (done.status, done.said) == (0, [])
    shown = run_process("plan", "show", path, PYTHONPATH=str(example))
    assert json.loads(shown.out)["halting"]["rule"] == {"type": "steady", "threshold": 0.99}
    code = (
        "import sys; from quicksilver import Plan; plan = Plan.load(sys.argv[1]); assert 'torch' not in sys.modules;"
        " print(Plan.from_dict(plan.to_dict()) == plan)"
    )
    command = [sys.executable, "-c", code, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(example)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANGS, check=False)
    assert (done.stdout, own_lines(done.stderr)) == ("True\n", [])


def test_eval_runs_it_and_counts_it(folder: Path, text_file: Path, example: Path, tmp_path: Path) -> None:
    path, results = plan_file(tmp_path, STEADY), tmp_path / "rows.json"
    command = ("eval", folder, "--text", text_file, *CUT, "--plan", path, "--json", results)
    done = run_process(*command, PYTHONPATH=str(example))
    assert done.status == 0, done.err
    (row,) = json.loads(results.read_text())
    assert row["accelerated"]["mean_depth"] < 2.0  # of four layers; the first tokens are protected
    assert 0.2 < row["delta"]["flops_body_reduction"] < 0.75
    assert_refusal(run_process(*command), "halting.rule.type must be one of all, drift", "got 'steady'")


REFUSED: dict[str, tuple[dict[str, str], str, tuple[str, ...]]] = {
    "raises": ({"steady": "broken"}, "1 / 0", ("package 'their-rule'", "ZeroDivisionError: division by zero")),
    "lacks a module": ({"steady": "broken"}, "import no_such_module", ("package 'their-rule'", "no_such_module")),
    "is missing": ({"steady": "gone:Rule"}, "", ("package 'their-rule'", "No module named 'gone'")),
    "lacks the class": ({"steady": "broken:Rule"}, "", ("package 'their-rule'", "Rule")),
    "registers nothing": ({"steady": "broken"}, "", ("package 'their-rule'", "no such halting rule")),
    "registers another": ({"steady": "broken"}, GOOD + OTHER_NAME, ("package 'their-rule'", "no such halting rule")),
    "takes a name of ours": (
        {"steady": "broken"},
        GOOD + OTHER_NAME.replace('"other"', '"drift"'),
        ("package 'their-rule'", "'drift' is quicksilver.rules.paper.DriftRule already"),
    ),
    "says several lines": ({"steady": "broken"}, "raise RuntimeError('one\\ntwo')", ("RuntimeError: one",)),
    "brings others": ({"calm": "broken"}, "1 / 0", ("must be one of all, calm, drift", "relative, got 'steady'")),
}


@pytest.mark.parametrize(("entries", "text", "names"), REFUSED.values(), ids=list(REFUSED))
def test_a_broken_package_is_named(
    entries: dict[str, str],
    text: str,
    names: tuple[str, ...],
    tmp_path: Path,
) -> None:
    install(tmp_path / "site", "their-rule", entries, broken=text)
    outcome = run_process("plan", "validate", plan_file(tmp_path, STEADY), PYTHONPATH=str(tmp_path / "site"))
    assert_refusal(outcome, "halting.rule.type", *names)


def test_two_packages_that_bring_one_name(tmp_path: Path, example: Path) -> None:
    install(example, "another-rule", {"steady": "steady_rule:SteadyRule"})
    outcome = run_process("plan", "validate", plan_file(tmp_path, STEADY), PYTHONPATH=str(example))
    assert_refusal(outcome, "'another-rule'", "'quicksilver-steady-rule'", "uninstall all but one")


def test_a_package_brings_a_similarity(tmp_path: Path) -> None:
    near = """
@rules.fusion_rule("near")
@dataclass(frozen=True)
class Near(rules.SimilarityRule):
    def decide(self, view):
        distance = (view.later - view.earlier).abs().amax(-1)
        return rules.FusionDecision(distance < rules.threshold_at(self.threshold, view.ordinal))
"""
    site, fusion = tmp_path / "site", {"rule": {"type": "near", "threshold": 1.0}}
    install(site, "near-rule", {"near": "near_rule"}, near_rule=GOOD + near)
    path = plan_file(tmp_path, {"version": 2, "fusion": fusion})
    shown = run_process("plan", "show", path, PYTHONPATH=str(site))
    assert json.loads(shown.out)["fusion"]["rule"] == fusion["rule"]
    assert_refusal(run_process("plan", "show", path), "fusion.rule.type must be one of cosine, forced, l2, random, got")
    other = plan_file(tmp_path, {"version": 2, "halting": fusion})
    outcome = run_process("plan", "show", other, PYTHONPATH=str(site))
    assert_refusal(outcome, "package 'near-rule' brings 'near'", "registers no such halting rule")


def test_a_value_that_the_rule_refuses(example: Path, tmp_path: Path) -> None:
    low = {"version": 2, "halting": {"rule": {"type": "steady", "threshold": "low"}}}
    outcome = run_process("plan", "validate", plan_file(tmp_path, low), PYTHONPATH=str(example))
    assert_refusal(outcome, "SteadyRule: threshold must be a number", "halting.rule")


def test_pip_installs_the_example(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = shutil.copytree(EXAMPLE, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", tmp_path / "site", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    outcome = run_process("plan", "validate", plan_file(tmp_path, STEADY), PYTHONPATH=str(tmp_path / "site"))
    assert (outcome.status, outcome.said) == (0, [])


RAISES = """
@rules.halting_rule("raising")
@dataclass(frozen=True)
class Raising(rules.ThresholdRule):
    where: str = "decide"

    def check_depth(self, num_layers):
        return 1 / (self.where != "check_depth")

    def may_halt(self, layer_idx, first=None):
        return {}["first"] if self.where == "may_halt" else True

    def decide(self, view):
        raise ValueError("no signal\\nat all")
"""


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("decide", "Raising.decide failed: ValueError: no signal"),
        ("check_depth", "Raising.check_depth failed: ZeroDivisionError: division by zero"),
        ("may_halt", "Raising.may_halt failed: KeyError: 'first'"),
    ],
)
def test_a_rule_that_raises_ends_a_command_in_a_line(
    refused: Callable[..., str],
    tiny_model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    said: str,
) -> None:
    install(
        tmp_path / "site", "their-rule", {"raising": f"raising_{where}:Raising"}, **{f"raising_{where}": GOOD + RAISES}
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    rule = {"type": "raising", "threshold": 1.0, "where": where}
    plan = plan_file(tmp_path, {"version": 2, "halting": {"rule": rule, "min_layer": 1}})
    try:
        refused("generate", tiny_model_dir("llama"), "Once", "--max-new-tokens", 4, "--plan", plan, names=(said,))
    finally:
        HALTING_RULES._classes.pop("raising", None)
