"""`python -m benchmarks.step`: where the time of one decoded token goes, by parts, for greedy decoding and sampling.

Parts are timed where they run, step by step; the clock is read twice for each call of a part, about 5 us a step in all.
Engines are compared by other benchmarks.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

import quicksilver
from benchmarks import rows, timing
from benchmarks.rows import Measurement
from quicksilver import rules
from quicksilver.backends.native import NativeBackend
from quicksilver.core.sources import resolve_model
from quicksilver.families import kernels
from quicksilver.families.quantize import quantize_model
from quicksilver.loading.load import load_plain
from quicksilver.plan import Plan
from quicksilver.runtime.loop import Decoder
from quicksilver.runtime.sampling import Draw, Ending, TokenChoice
from quicksilver.weights.config import QuantizationConfig

Steps = list[dict[str, float]]

SEED = 0
REFERENCE = "ref-llama"
_DISTINCT = 4  # layers of a large model that differ; together larger than a cache, and repeated up to its depth
_SPREAD = 4.0  # of random logits: their entropy is then about that of text, 3 nats, and top_p keeps as many tokens
_WARMUP = 4  # first steps of a call, timed by nobody

_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_QWEN25 = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, Callable[[int], nn.Module]] = {
    "smollm2-135m": lambda layers: LlamaForCausalLM(LlamaConfig(**_SMOLLM2)),
    "qwen2.5-1.5b": lambda layers: Qwen2ForCausalLM(Qwen2Config(**_QWEN25 | {"num_hidden_layers": layers})),
}
"""Random models of published shapes; how deep where distinct layers are repeated."""
_REPEATED = {"qwen2.5-1.5b": _QWEN25["num_hidden_layers"]}
"""Those of which a few layers are made and repeated to the whole depth."""
_LIMITS = {"smollm2-135m": 0.25, "qwen2.5-1.5b": 0.10}
"""The most of a step's parts that may be outside of matrices and attention."""

_SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy, penalty": {"do_sample": False, "repetition_penalty": 1.1},
    "temperature": _SAMPLING,
    "temperature, seed": _SAMPLING | {"seed": SEED},
    "top_k": _SAMPLING | {"top_k": 50},
    "top_p": _SAMPLING | {"top_p": 0.9},
    "top_k, top_p": _SAMPLING | {"top_k": 50, "top_p": 0.9},
    "top_k, top_p, penalty": _SAMPLING | {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
}
"""What `generate` is asked for."""

_TIMED: tuple[tuple[Any, str, str], ...] = (
    (NativeBackend, "run", "call of layers"),
    (kernels, "multiply", "head"),
    (Decoder, "logits", "call of head"),
    (Decoder, "run", "loop"),
    (Draw, "__call__", "draw"),
    (TokenChoice, "__call__", "processors"),
    (Ending, "look", "stopping"),
)
"""Whose method is which part; each without the parts inside it."""
_STAGES = {
    "matrices": "layers' matrices",
    "inputs": "inputs to codes",
    "attention": "attention",
    "norms": "norms, activations",
    "entries": "rotary, entries",
}
"""The kernels' stages by what they are called here; all inside the call of layers."""
_REST = "rest"
WORK = ("layers' matrices", "inputs to codes", "attention", "head")
"""What is not outside of matrices and attention."""
PARTS = (*_STAGES.values(), "call of layers", "head", *(p for _, _, p in _TIMED[2:]), _REST)


@dataclass
class Watch:
    """Seconds of parts, each without those inside it, and the same of each step; a streamer, so that it sees steps."""

    steps: Steps = field(default_factory=list)
    _seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inside: list[str] = field(default_factory=lambda: [_REST])
    _since: float = 0.0
    _runner: Any = None

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return a function that does the same, and is timed as a part."""

        def call(*arguments: Any, **options: Any) -> Any:
            self._lap()
            self._inside.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self._lap()
                self._inside.pop()

        return call

    @contextmanager
    def over(self, model: Any) -> Iterator[Watch]:
        """Time the parts while it lasts."""
        originals = [(owner, name, vars(owner)[name]) for owner, name, _ in _TIMED]
        self._runner = model.backend._runner
        try:
            for (owner, name, function), (_, _, part) in zip(originals, _TIMED, strict=True):
                setattr(owner, name, self.timed(function, part))
            yield self
        finally:
            for owner, name, function in originals:
                setattr(owner, name, function)

    def put(self, tokens: torch.Tensor) -> None:
        """End a step."""
        self._lap()
        stages = self._runner.stage_seconds
        self._runner.time_stages()
        for stage, part in _STAGES.items():
            self._seconds[part] = stages[stage]
        self._seconds["call of layers"] -= sum(stages.values())
        self.steps.append(dict(self._seconds))
        self._seconds.clear()
        self._since = time.perf_counter()

    def end(self) -> None:
        """Take no notice of the end."""

    def _lap(self) -> None:
        now = time.perf_counter()
        self._seconds[self._inside[-1]] += now - self._since
        self._since = now


def build(shape: str) -> Any:
    """Return a random model of a shape, or an embedded one, quantized in memory with its head.

    A large one repeats a few distinct layers.
    """
    torch.manual_seed(SEED)
    model: Any = SHAPES[shape](_DISTINCT).eval() if shape in SHAPES else load_plain(resolve_model(shape)).float()
    if shape in SHAPES:
        spread_of_head = model.lm_head.weight.std() * model.config.hidden_size**0.5
        model.model.norm.weight.data.fill_(_SPREAD / spread_of_head)
    quantize_model(model, QuantizationConfig(embeddings=False))
    if depth := _REPEATED.get(shape):
        layers = model.model.layers
        model.model.layers = nn.ModuleList([layers[i % _DISTINCT] for i in range(depth)])
        model.config.layer_types = list(model.config.layer_types[:1]) * depth
        model.config.num_hidden_layers = depth
    return model


def plan_of(bits: int) -> Plan:
    """Return the plan that reads all of the layers' weights in so many bits."""
    config = rules.PrecisionConfig(rules.UniformBitsRule(bits), protect_first=0, protect_special=False)
    return Plan(f"uniform-{bits}", precision=config, kv=rules.KVConfig(bits=16))


def measure(model: Any, prompt: torch.Tensor, tokens: int, repeats: int) -> dict[str, list[Steps]]:
    """Return the parts' seconds of each step, by case and round; cases are run in turn."""
    taken: dict[str, list[Steps]] = {name: [] for name in CASES}
    common = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": tokens + _WARMUP}
    for options in CASES.values():
        model.generate(prompt, **common | options)
    for _ in range(repeats):
        for name, options in CASES.items():
            with Watch().over(model) as watch:
                model.generate(prompt, streamer=watch, **common | options)
            taken[name].append(watch.steps[1 + _WARMUP :])  # the prompt was the first
    return taken


def summarised(shape: str, taken: Mapping[str, list[Steps]]) -> list[Measurement]:
    """Return seconds per token of each case, a median of each round, and the medians of its parts over all steps."""
    measured = []
    for case, rounds in taken.items():
        steps = [step for each in rounds for step in each]
        parts = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in PARTS}
        outside = 1.0 - sum(parts[part] for part in WORK) / sum(parts.values())
        values = tuple(statistics.median(sum(step.values()) for step in each) for each in rounds)
        details = {"parts": parts, "outside": outside, "limit": _LIMITS.get(shape)}
        measured.append(Measurement(shape, case, "greedy", "seconds per token", values, details))
    return measured


def print_table(shape: str, heading: str, measured: list[Measurement]) -> None:
    """Print microseconds of each part, a column for each case, and what is outside of matrices and attention."""
    console = Console(width=190)
    console.print(heading, highlight=False, markup=False)
    table = Table(f"{shape}, us a token", *(each.engine for each in measured))
    for part in PARTS:
        table.add_row(part, *(f"{1e6 * each.details['parts'][part]:.0f}" for each in measured))
    table.add_row("whole", *(f"{1e6 * timing.summarise(each.values).median:.0f}" for each in measured))
    ratios = [rows.ratio_to_baseline(each, measured) for each in measured]
    table.add_row("whole / greedy", *(f"{ratio.median:.2f}" for ratio in ratios))
    table.add_row("outside", *(f"{each.details['outside']:.1%}" for each in measured))
    console.print(table)
    limit = _LIMITS.get(shape)
    if limit is not None:
        missed = [each.engine for each in measured if each.details["outside"] > limit]
        console.print(f"outside at most {limit:.0%}: {'MISSED by ' + '; '.join(missed) if missed else 'met by all'}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--shape", "shapes", type=click.Choice([*SHAPES, REFERENCE]), multiple=True, help="Default: all.")
@click.option("--bits", type=click.Choice(["8", "6", "4", "2"]), default="4", show_default=True, help="Of layers.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
@click.option("--repeats", type=click.IntRange(min=5), default=5, show_default=True, help="Timed rounds.")
@click.option("--tokens", type=click.IntRange(min=1), default=24, show_default=True, help="Decoded in each round.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Before decoding.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="JSON-lines file that the rows are appended to.",
)
def main(shapes: tuple[str, ...], output: Path | None, **sizes: Any) -> None:
    """Print where a decoded token's time goes; a missed limit is reported and changes nothing.

    \b
    Examples:
      python -m benchmarks.step
      python -m benchmarks.step --shape smollm2-135m --threads 1
    """
    logging.set_verbosity_error()
    torch.set_num_threads(sizes["threads"])
    plan = plan_of(int(sizes["bits"]))
    for shape in shapes or (*SHAPES, REFERENCE):
        click.echo(shape, err=True)
        model = quicksilver.accelerate(build(shape), plan, ())
        if model.backend.name != "native":
            raise click.ClickException(f"the kernels do not run {shape}: {model.backend.reason}")
        generator = torch.Generator().manual_seed(SEED)
        prompt = torch.randint(3, model.config.vocab_size, (1, sizes["prompt_tokens"]), generator=generator)
        measured = summarised(shape, measure(model, prompt, sizes["tokens"], sizes["repeats"]))
        of_model = {"shape": shape, "weights": _weights_of(shape), "layers": model.adapter.spec.num_layers}
        described = rows.to_rows("step", measured, {"model": of_model, "settings": sizes}, model.device)
        if output is not None:
            rows.append(output, described)
        print_table(shape, _heading(described[0]), measured)


def _weights_of(shape: str) -> str:
    if shape == REFERENCE:
        return "the model's own"
    return f"random, seed {SEED}{f', {_DISTINCT} layers repeated' if shape in _REPEATED else ''}"


def _heading(row: dict[str, Any]) -> str:
    model, sizes = row["model"], row["settings"]
    return (
        f"{model['layers']} layers at {sizes['bits']} bits, head at 8; weights: {model['weights']}; {row['threads']}"
        f" threads, {row['cpu']}; {sizes['tokens']} tokens after {sizes['prompt_tokens']}, {sizes['repeats']} rounds;"
        f" quicksilver {row['quicksilver']} ({row['commit']}), torch {row['torch']},"
        f" transformers {row['transformers']}; medians of steps"
    )


if __name__ == "__main__":
    main()
