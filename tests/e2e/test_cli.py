"""The command line as a user meets it: help, lists, plans, generation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import quicksilver
from quicksilver.cli.main import _COMMANDS
from quicksilver.model import QuickSilverForCausalLM
from quicksilver.plan import PRESETS
from tests import HANGS, tiny
from tests.e2e.conftest import FORCED, RANDOM, ModelFolder, Outcome, own_lines


def test_version(cli: Callable[..., Outcome]) -> None:
    outcome = cli("--version")
    assert (outcome.status, outcome.out) == (0, f"quicksilver, version {quicksilver.__version__}\n")


COMMAND_LINES = [(), *((name,) for name in _COMMANDS), *(("plan", name) for name in ("list", "show", "validate"))]


@pytest.mark.parametrize("command", COMMAND_LINES, ids=lambda command: " ".join(command) or "quicksilver")
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_examples(cli: Callable[..., Outcome], command: tuple[str, ...], flag: str) -> None:
    outcome = cli(*command, flag)
    assert (outcome.status, outcome.said) == (0, [])
    assert outcome.out.startswith("Usage: quicksilver")
    assert re.search(rf"Examples?:\n +quicksilver {' '.join(command)}", outcome.out), outcome.out


def test_plans_named_in_examples_exist(cli: Callable[..., Outcome]) -> None:
    named = {name for line in COMMAND_LINES for name in re.findall(r"--plan ([^\s\]]+)", cli(*line, "-h").out)}
    presets = {name for name in named if name.islower() and not name.endswith(".json")}
    assert "paper" in presets
    assert presets <= set(PRESETS)


def test_help_lists_every_command(cli: Callable[..., Outcome]) -> None:
    for name in _COMMANDS:
        assert re.search(rf"^  {name} ", cli("--help").out, re.MULTILINE)


def test_models_lists_the_families(cli: Callable[..., Outcome]) -> None:
    outcome = cli("models")
    assert (outcome.status, outcome.said) == (0, [])
    families, embedded = outcome.out.split("embedded models:\n")
    assert families.split() == ["families:", *tiny.FAMILIES]
    from quicksilver.core.sources import embedded_models

    assert embedded.split() == embedded_models()


def test_plan_list_prints_one_name_per_line(cli: Callable[..., Outcome]) -> None:
    outcome = cli("plan", "list")
    assert (outcome.status, outcome.said) == (0, [])
    names = outcome.out.splitlines()
    assert {"dense", "paper"} <= set(names)
    assert all(re.fullmatch(r"([a-z0-9-]+/)?[a-z][a-z0-9-]*", name) for name in names)
    assert len(set(names)) == len(names)
    for name in names:
        assert cli("plan", "validate", name).status == 0


@pytest.mark.parametrize("name", ["dense", "paper", "settled"])
def test_a_shown_plan_is_valid_when_saved(cli: Callable[..., Outcome], tmp_path: Path, name: str) -> None:
    shown = cli("plan", "show", name)
    assert json.loads(shown.out)["name"] == name
    saved = tmp_path / "saved.json"
    saved.write_text(shown.out)
    outcome = cli("plan", "validate", saved)
    assert (outcome.status, outcome.said) == (0, [])
    assert str(saved) in outcome.out
    assert json.loads(shown.out)["hash"] in outcome.out
    assert cli("plan", "show", saved).out == shown.out


def test_a_plan_without_a_name_goes_by_its_files(cli: Callable[..., Outcome], plan_file: Callable[..., Path]) -> None:
    assert json.loads(cli("plan", "show", plan_file("gentle.json", halting=RANDOM)).out)["name"] == "gentle"
    assert json.loads(cli("plan", "show", plan_file("y.json", name="x", halting=RANDOM)).out)["name"] == "x"


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_generate_prints_what_transformers_generates(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], family: str
) -> None:
    folder = tiny_model_dir(family)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The river", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    outcome = cli("generate", folder, "The river", "--max-new-tokens", 12)
    assert (outcome.status, outcome.said) == (0, [])
    assert outcome.out.rstrip("\n") == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\n")


def test_generate_stats_go_to_stderr(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], plan_file: Callable[..., Path]
) -> None:
    plan = plan_file(halting={**FORCED, "rule": {"type": "forced", "depths": [2]}})
    arguments = ("generate", tiny_model_dir("gpt2"), "The river", "--max-new-tokens", 8, "--plan", plan)
    plain, with_stats = cli(*arguments), cli(*arguments, "--stats")
    assert "mean depth" not in plain.err
    assert with_stats.out == plain.out
    assert "tokens          16 (16 halted early)" in with_stats.err
    assert "mean depth      2.00 of 4 layers" in with_stats.err
    for label in ("FLOPs", "weights read", "cache", "time", "new tokens/s"):
        assert label in with_stats.err


def test_generate_reads_stdin(cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path]) -> None:
    folder = tiny_model_dir("llama")
    typed = cli("generate", folder, "Łódź lies", "--max-new-tokens", 6)
    piped = cli("generate", folder, "-", "--max-new-tokens", 6, stdin="Łódź lies".encode())
    assert piped == typed
    assert typed.status == 0


def test_generate_is_reproducible_by_seed(cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path]) -> None:
    sampled = ("generate", tiny_model_dir("qwen2"), "The river", "--max-new-tokens", 20, "--temperature", 1.5)
    first, again, other = (cli(*sampled, "--seed", seed) for seed in (1, 1, 2))
    assert first.status == 0
    assert first == again
    assert first.out != other.out
    assert cli(*sampled).out == cli(*sampled, "--seed", 0).out


def test_sampling_options_reach_generate(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return kwargs["input_ids"]

    monkeypatch.setattr(QuickSilverForCausalLM, "generate", generate)
    arguments = ("generate", tiny_model_dir("gpt2"), "x", "--max-new-tokens", 3)
    cli(*arguments)
    assert (seen["do_sample"], seen["max_new_tokens"]) == (False, 3)
    cli(*arguments, "--temperature", 0.7, "--top-k", 5, "--top-p", 0.9)
    wanted = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    assert {key: seen[key] for key in wanted} == wanted


def test_the_most_likely_token_alone_is_greedy(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path]
) -> None:
    arguments = ("generate", tiny_model_dir("llama"), "The river", "--max-new-tokens", 10)
    greedy = cli(*arguments)
    assert cli(*arguments, "--temperature", 0.9, "--top-k", 1).out == greedy.out
    assert cli(*arguments, "--temperature", 0.9, "--top-p", 1e-6).out == greedy.out


def test_a_models_own_sampling_defaults_do_not_make_greedy_random(
    cli: Callable[..., Outcome], model_copy: Callable[..., ModelFolder]
) -> None:
    folder = model_copy("llama").path
    arguments = ("generate", folder, "The river", "--max-new-tokens", 10)
    greedy = cli(*arguments)
    defaults = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "max_length": 12, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    assert cli(*arguments).out == greedy.out
    assert greedy.status == 0


def test_generation_stops_at_the_models_context(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path]
) -> None:
    outcome = cli("generate", tiny_model_dir("gpt2"), "y" * 60, "--max-new-tokens", 50)
    assert outcome.status == 0
    assert outcome.said == ["quicksilver: note: only 4 tokens fit the model's context"]


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_generation_quietly(tiny_model_dir: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "quicksilver.cli.main", "generate", str(tiny_model_dir("gpt2")), "The river"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert own_lines(process.stderr.read()) == ["quicksilver: note: only 55 tokens fit the model's context"]
    process.stderr.close()
    assert process.wait(timeout=HANGS) == 141


def test_an_interrupt_ends_with_one_line(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(QuickSilverForCausalLM, "generate", interrupt)
    outcome = cli("generate", tiny_model_dir("gpt2"), "x", "--max-new-tokens", 3)
    assert (outcome.status, outcome.out) == (130, "")
    assert outcome.said == ["quicksilver: interrupted"]
