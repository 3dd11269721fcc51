"""What the comparison on real files makes of its figures, and the prompts that engines keep; llama.cpp is not run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import quicksilver
from benchmarks.peers import agreement, held, real
from benchmarks.peers.held import HeldEngine
from benchmarks.peers.llama_cpp_engine import HeldLlamaCpp, Setting
from quicksilver.ops import native
from tests import tiny


def row(task: str, engine: str, median: float, unit: str, ratio: float) -> dict[str, Any]:
    return {
        "task": task, "engine": engine, "median": median, "unit": unit, "baseline": real.LLAMA, "commit": "abc",
        "ratio_to_baseline": ratio, "model": {"name": "a.gguf"}, "threads": 2, "cpu": "cpu", "quality": {"kl": 1e-4},
        "settings": {"rounds": 5, "prefill_tokens": 512},
    }  # fmt: skip


def test_the_table_has_tokens_per_second_and_how_many_times_llama_cpps() -> None:
    ours = f"{held.OURS} (avx2)"
    measured = [
        row("prefill", real.LLAMA, 2.0, "seconds", 1.0),
        row("prefill", ours, 1.0, "seconds", 0.5),
        {**row("bandwidth", real.READ, 20e9, "bytes per second", 1.0), "baseline": real.READ},
        row("decode after 128", real.LLAMA, 0.01, "seconds per token", 1.0),
        row("decode after 128", ours, 0.02, "seconds per token", 2.0),
        row("load", real.LLAMA, 0.5, "seconds", 1.0),
        row("load", held.OURS, 1.0, "seconds", 2.0),
    ]
    lines = [line for line in real.table(measured).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| llama.cpp | 256.0 |  | 100.0 |  | 0.50 |  | 1.0e-04 |"
    assert lines[3] == f"| {ours} | 512.0 | 2.00 | 50.0 | 0.50 | 1.00 | 0.50 | 1.0e-04 |"


@pytest.mark.parametrize("depths", ["", "a", "0,5", "1,,2", "-3", "1.5"])
def test_depths_that_are_no_numbers_end_in_one_line(depths: str, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    result = CliRunner().invoke(real.main, [str(file), "--depths", depths])
    assert result.exit_code == 2
    assert "whole numbers above 0" in result.output


def test_a_file_that_is_none_ends_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    result = CliRunner().invoke(real.main, [str(file)])
    assert result.exit_code == 2
    assert "a.gguf" in result.output
    assert "Traceback" not in result.output


@pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")
@torch.inference_mode()
def test_a_kept_prompt_decodes_as_if_it_were_fed_anew() -> None:
    run = quicksilver.accelerate(tiny.quantized("llama"), "dense", (), "native")
    ids = torch.arange(3, 23).tolist()
    engine = HeldEngine("a", "b", run, isa=native.instruction_set())
    for depth in (4, 9, 9, 6):  # deeper, again, and less deep
        cache = engine.start(ids[:depth])
        assert cache.seq_lengths == [depth]
        got = run(torch.tensor([ids[depth : depth + 1]]), past_key_values=cache, use_cache=True).logits[0, -1]
        torch.testing.assert_close(got, run(torch.tensor([ids[: depth + 1]])).logits[0, -1])


class Counting(HeldLlamaCpp):
    """What is kept, without llama.cpp."""

    def __init__(self) -> None:
        self._held, self.fed, self.removed = [], [], []
        self._contexts, self._chosen = {Setting(False): "context"}, {"decode": Setting(False)}
        self._lib = self

    def llama_get_memory(self, context: str) -> str:
        return context

    def llama_memory_seq_rm(self, memory: str, sequence: int, begin: int, end: int) -> None:
        self.removed.append(begin)

    def llama_memory_clear(self, memory: str, data: bool) -> None:
        self.removed.append(0)

    def _feed(self, context: Any, ids: Sequence[int], start: int, all_logits: bool = False) -> None:
        self.fed.append((start, list(ids)))


def test_llama_cpp_is_fed_what_it_lacks_of_a_prompt() -> None:
    engine = Counting()
    for prompt in ([1, 2], [1, 2, 3, 4], [1, 2, 3, 4], [9, 2]):
        engine.start(prompt)
    assert engine.fed == [(0, [1, 2]), (2, [3, 4]), (0, [9, 2])]
    engine._emptied("decode")
    engine.start([9, 2])
    assert engine.fed[-1] == (0, [9, 2])


def test_a_loss_is_paired_by_token_with_its_standard_error() -> None:
    floats = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    ours = torch.log(torch.tensor([[0.25, 0.75], [0.75, 0.25]]))
    loss = agreement.summarise([agreement.part_of(floats, ours, torch.tensor([0, 0]))])
    deltas = torch.tensor([math.log(2), math.log(0.5 / 0.75)], dtype=torch.float64)
    assert loss.tokens == 2
    assert loss.delta == pytest.approx(float(deltas.mean()), rel=1e-6)
    assert loss.standard_error == pytest.approx(float(deltas.std()) / math.sqrt(2), rel=1e-6)
    assert loss.kl == pytest.approx(0.5 * math.log(0.25 / (0.25 * 0.75)), rel=1e-6)
    assert loss.top1_agreement == 0.5


def test_the_first_other_token_is_found() -> None:
    assert agreement.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert agreement.first_difference([1, 2, 3], [1, 5, 3]) == 1


@pytest.mark.parametrize(("delta", "verdict"), [(0.001, "pass"), (0.0021, "MISSED"), (math.nan, "MISSED")])
def test_a_loss_is_held_against_its_bar(delta: float, verdict: str) -> None:
    loss = agreement.Loss(10, 2.0, 2.0, delta, 1e-4, 1e-4, 0.9)
    words = agreement.in_words({"task": "loss", "model": {"name": "a"}, **loss._asdict()})
    assert words.startswith(f"{verdict}: a: ")


def test_every_difference_has_a_line() -> None:
    differences = [agreement.Difference(3, 7, 0.01, 0.02)._asdict()]
    found = {"task": "greedy", "model": {"name": "a"}, "prompts": 20, "equal": 19, "differences": differences}
    assert agreement.in_words(found).splitlines() == [
        "a: greedy tokens equal llama.cpp's on 19 of 20 prompts",
        "  prompt 3, token 7: our margin 0.0100, to theirs 0.0200",
    ]
