"""`python -m benchmarks.peers.agreement MODEL ...`: what rounding activations to 8 bits costs, and where tokens differ.

Perplexity of quantized models by the compiled kernels is compared with that of the same weights as float32 numbers
(PyTorch's path), token by token; on GGUF files greedy tokens are compared with llama.cpp's. Nothing is timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

import quicksilver
from benchmarks import rows
from benchmarks.memory import call_apart
from benchmarks.peers import llama_cpp_engine, roster
from benchmarks.peers.engines import TorchEngine, set_up_torch
from benchmarks.peers.measuring import say
from benchmarks.peers.remote import explained
from benchmarks.rows import Measurement
from quicksilver.core.sources import is_gguf, resolve_model
from quicksilver.loading.load import load_tokenizer
from quicksilver.measure.texts import read_text
from quicksilver.measure.windows import Window, WindowConfig, default_bos, slide
from quicksilver.ops import native

MOST_LOSS = 0.002  # nats that rounded activations may cost
_RESULTS = Path(__file__).parent.parent / "results" / "agreement.jsonl"
_CONTEXT = 2048
_ROWS = 256  # of logits held at a time, as float64


class Loss(NamedTuple):
    """What kernels cost beside floats, over the same tokens.

    Attributes:
        tokens: scored.
        float_nll, native_nll: means, nats.
        delta: native - float, mean.
        standard_error: of that mean, differences of tokens taken for independent.
        kl: mean of KL(float || native), nats.
        top1_agreement: share of tokens with the same most likely one.
    """

    tokens: int
    float_nll: float
    native_nll: float
    delta: float
    standard_error: float
    kl: float
    top1_agreement: float


class Difference(NamedTuple):
    """Where two engines' greedy tokens part.

    Attributes:
        prompt: its number.
        place: of the first other token among the new ones, from 0.
        margin: our largest logit there less the second.
        to_theirs: our largest logit less that of the token that llama.cpp took.
    """

    prompt: int
    place: int
    margin: float
    to_theirs: float


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, required=True, envvar="QUICKSILVER_GGUF_FILES")
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", type=click.IntRange(min=2), default=4000, show_default=True, help="Of the text, scored.")
@click.option("--prompts", type=click.IntRange(min=0), default=20, show_default=True, help="Of greedy generation.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=_RESULTS,
    show_default="results/agreement.jsonl",
)
def main(models: Sequence[str], text: Path, tokens: int, threads: int, output: Path, **greedy: int) -> None:
    """Compare the compiled kernels with floats on quantized MODELS, GGUF files or folders; and with llama.cpp on files.

    Windows are of 2,048 tokens, or the model's most, by half of that. A loss above 0.002 nats is reported as MISSED.
    """
    with explained():
        words = read_text(text).texts[0]
        torch.set_num_threads(threads)
        for name in models:
            compared = compare(name, words, tokens, threads, **greedy)
            rows.append(output, compared)
            for row in compared:
                click.echo(in_words(row))


def compare(
    name: str, text: str, tokens: int, threads: int, prompts: int, prompt_tokens: int, new_tokens: int
) -> list[dict[str, Any]]:
    """Return the rows of one model: its loss, and for a GGUF file how its greedy tokens differ from llama.cpp's."""
    source = str(resolve_model(name))
    tokenizer = load_tokenizer(source)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) < max(tokens, prompts * prompt_tokens):
        raise ValueError(f"the text holds {len(ids)} tokens of {Path(source).name}, more are needed")
    say(f"{Path(source).name}: perplexity")
    loss = call_apart(measure_loss, source, ids[:tokens], default_bos(tokenizer), threads)
    found = [Measurement("loss", "quicksilver", "quicksilver", "nats", (loss.delta,), loss._asdict())]
    if is_gguf(source) and prompts:
        step = (len(ids) - prompt_tokens) // prompts
        starts = [ids[i * step : i * step + prompt_tokens] for i in range(prompts)]
        say(f"{Path(source).name}: greedy tokens")
        theirs = call_apart(greedy_of_llama, Path(source), starts, new_tokens, threads)
        parted = call_apart(differences, source, starts, theirs, threads)
        details = {
            "prompts": prompts,
            "equal": prompts - len(parted),
            "differences": [each._asdict() for each in parted],
        }
        found.append(Measurement("greedy", "quicksilver", "quicksilver", "differences", (float(len(parted)),), details))
    settings = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "tokens": tokens}
    shared = {"model": {"name": Path(source).name}, "peers": roster.versions(), "settings": settings}
    return rows.to_rows("agreement", found, {**shared, "isa": native.instruction_set()}, torch.device("cpu"))


@torch.inference_mode()
def measure_loss(source: str, ids: list[int], bos: int | None, threads: int) -> Loss:
    """Return what the kernels cost beside PyTorch's path, which multiplies the weights as float32 numbers."""
    set_up_torch(threads)
    theirs, ours = (quicksilver.load(source, kernels=kernels, special_ids=()) for kernels in ("torch", "native"))
    context = min(_CONTEXT, theirs.config.max_position_embeddings)
    windows = slide(ids, WindowConfig(context, context // 2, bos))
    return summarise([part for window in windows for part in _window(theirs, ours, window)])


class Part(NamedTuple):
    """Some tokens scored: negative log-likelihoods [n], divergences [n], and whether the first choice agrees [n]."""

    floats: Tensor
    native: Tensor
    kl: Tensor
    agrees: Tensor


def _window(theirs: Any, ours: Any, window: Window) -> list[Part]:
    fed = torch.tensor([window.token_ids])
    first = window.first_scored - 1
    targets = fed[0, first + 1 :]
    logits = [model(fed[:, :-1], logits_to_keep=len(targets)).logits[0] for model in (theirs, ours)]
    return [part_of(a, b, target) for a, b, target in zip(*(t.split(_ROWS) for t in (*logits, targets)), strict=True)]


def part_of(floats: Tensor, native_logits: Tensor, targets: Tensor) -> Part:
    """Return what two engines' logits [n, vocab] tell of targets [n]."""
    log_p, log_q = (torch.log_softmax(each.double(), dim=-1) for each in (floats, native_logits))
    picked = [-each.gather(1, targets[:, None])[:, 0] for each in (log_p, log_q)]
    return Part(*picked, (log_p.exp() * (log_p - log_q)).sum(-1), log_p.argmax(-1) == log_q.argmax(-1))


def summarise(parts: Sequence[Part]) -> Loss:
    """Return the means over tokens, and the standard error of the paired difference."""
    floats, ours, kl, agrees = (torch.cat(each) for each in zip(*parts, strict=True))
    delta, count = ours - floats, len(floats)
    error = float(delta.std()) / math.sqrt(count) if count > 1 else math.nan
    means = (float(each.mean()) for each in (floats, ours, delta))
    return Loss(count, *means, error, float(kl.mean()), float(agrees.double().mean()))


def greedy_of_llama(path: Path, prompts: Sequence[Sequence[int]], count: int, threads: int) -> list[list[int]]:
    """Return llama.cpp's greedy tokens after each prompt."""
    (engine,) = llama_cpp_engine.load_held("llama.cpp", path, threads, max(map(len, prompts)) + count, (512,))
    return [engine.generate(prompt, count) for prompt in prompts]


def differences(
    source: str, prompts: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], threads: int
) -> list[Difference]:
    """Return where our greedy tokens part from others', by prompt; nothing where all are equal."""
    set_up_torch(threads)
    model = quicksilver.load(source, kernels="native", special_ids=())
    model.generation_config.eos_token_id = None
    engine = TorchEngine("quicksilver", "quicksilver", model)
    logits = partial(engine.logits, singly=0)
    found = []
    for number, (prompt, other) in enumerate(zip(prompts, theirs, strict=True)):
        place = first_difference(engine.generate(prompt, len(other)), other)
        if place is not None:
            last = logits([*prompt, *other[:place]])[-1]
            second, largest = np.partition(last, -2)[-2:]
            found.append(Difference(number, place, float(largest - second), float(largest - last[other[place]])))
    return found


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the place of the first token that differs, None where none does."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def in_words(row: dict[str, Any]) -> str:
    """Return a row for a reader."""
    name = row["model"]["name"]
    if row["task"] == "loss":
        verdict = "pass" if row["delta"] <= MOST_LOSS else "MISSED"
        return (
            f"{verdict}: {name}: kernels {row['native_nll']:.5f} nats, floats {row['float_nll']:.5f}, loss"
            f" {row['delta']:+.5f} +- {row['standard_error']:.5f} (at most {MOST_LOSS}), {row['tokens']} tokens;"
            f" KL {row['kl']:.2e}, top-1 {row['top1_agreement']:.2%}"
        )
    lines = [f"{name}: greedy tokens equal llama.cpp's on {row['equal']} of {row['prompts']} prompts"]
    lines += [
        f"  prompt {each['prompt']}, token {each['place']}: our margin {each['margin']:.4f},"
        f" to theirs {each['to_theirs']:.4f}"
        for each in row["differences"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
