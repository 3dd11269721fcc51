"""Bits per byte of a model folder on text: sliding windows, each token scored once.

A check for freshly trained models; the package's own evaluation is the one to report from.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from training.common import InputError, load_tokenizer, read_text, run_main, say

ROWS = 8  # full windows scored at once


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood (nats) and what it was summed over."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes)


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Return (begin, end, first scored target) of each window over `length` tokens.

    Targets are positions 1 to length-1; each is scored once, in the first window that holds it.
    """
    spans, scored = [], 1
    for begin in range(0, max(length - 1, 0), stride):
        end = min(begin + context, length)
        spans.append((begin, end, scored))
        scored = end
        if end == length:
            break
    return spans


@torch.no_grad()
def score_tokens(model: torch.nn.Module, tokens: list[int], context: int, stride: int) -> float:
    """Return the summed nats of every token after the first."""
    sequence = torch.tensor(tokens, device=model.device)
    spans = windows(len(tokens), context, stride)
    full = [span for span in spans if span[1] - span[0] == context]
    batches = [full[at : at + ROWS] for at in range(0, len(full), ROWS)]
    batches += [[span] for span in spans if span[1] - span[0] != context]
    total = 0.0
    for batch in batches:
        inputs = torch.stack([sequence[begin:end] for begin, end, _ in batch])
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
        nats = F.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten(), reduction="none")
        nats = nats.view(len(batch), -1)  # [B, T - 1]; column i scores position begin + 1 + i
        total += sum(float(row[first - begin - 1 :].sum()) for row, (begin, _, first) in zip(nats, batch, strict=True))
    return total


def score_text(model, tokenizer, text: str, context: int, stride: int, max_tokens: int = 0) -> Score:
    """Score one document, led in by the end-of-text token so that its first token counts too."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids, count = encoded["input_ids"], len(text.encode())
    if max_tokens and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        count = len(text[: encoded["offset_mapping"][max_tokens - 1][1]].encode())
    nats = score_tokens(model, [tokenizer.eos_token_id, *ids], context, stride)
    return Score(nats, len(ids), count)


def read_scored_documents(path: Path) -> list[str]:
    """Return the `text` fields of a .jsonl file, or a text file as one document."""
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [text]
    try:
        return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: each line must be a JSON object with a `text` field") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("texts", nargs="+", type=Path, help="text files (one document each) or .jsonl files")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=0, help="default: half the context")
    parser.add_argument("--max-tokens", type=int, default=0, help="score only this many tokens of each file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    stride = args.stride or args.context // 2
    if not 0 < stride < args.context:
        raise InputError("--stride must lie between 1 and the context less one")
    tokenizer = load_tokenizer(args.model)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(args.model), dtype=torch.float32, local_files_only=True)
    model.eval().to(args.device)
    for path in args.texts:
        total = Score()
        for document in read_scored_documents(path):
            left = args.max_tokens - total.tokens if args.max_tokens else 0
            if left < 0 or (args.max_tokens and left == 0):
                break
            total += score_text(model, tokenizer, document, args.context, stride, left)
        per_token = total.nats / total.tokens
        say(f"{path.name}: {total.bits_per_byte:.4f} bits per byte, {per_token:.4f} nats per token")
        print(
            json.dumps(
                {
                    "text": path.name,
                    "bits_per_byte": round(total.bits_per_byte, 5),
                    "nats_per_token": round(per_token, 5),
                    "tokens": total.tokens,
                    "bytes": total.bytes,
                    "context": args.context,
                    "stride": stride,
                }
            )
        )


if __name__ == "__main__":
    run_main(main)
