"""Calls of the package's own Python functions for one decoded token: `python -m benchmarks.calls [MODEL]`.

What a reader has to follow, and an interpreter to run, between one token and the next; seconds are other benchmarks'.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import quicksilver

PACKAGE = str(Path(quicksilver.__file__).parent)
PLANS = ("dense", "uniform-8bit", "mild", "strong")
PROMPT, TOKENS = 16, 8


def count(model: Any) -> tuple[float, Counter[str]]:
    """Return calls per decoded token in `generate`, and the files they are in with their shares of them."""
    ids = torch.arange(1, PROMPT + 1)[None]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    files: dict[int, Counter[str]] = {}
    for tokens in (TOKENS, 2 * TOKENS):  # their difference is of tokens alone
        seen: Counter[str] = Counter()

        def profile(frame: FrameType, event: str, _: object, seen: Counter[str] = seen) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
                seen[frame.f_code.co_filename.removeprefix(f"{PACKAGE}/")] += 1

        model.generate(ids, max_new_tokens=tokens, **options)  # what happens once has happened
        sys.setprofile(profile)
        try:
            model.generate(ids, max_new_tokens=tokens, **options)
        finally:
            sys.setprofile(None)
        files[tokens] = seen
    files[2 * TOKENS].subtract(files[TOKENS])
    difference = +files[2 * TOKENS]
    return difference.total() / TOKENS, difference


def main(name: str = "ref-llama") -> None:
    """Print the counts of several plans."""
    for plan in PLANS:
        model = quicksilver.load(name, plan=plan)
        calls, files = count(model)
        most = ", ".join(f"{file} {number / TOKENS:.0f}" for file, number in files.most_common(5))
        print(f"{name} {plan} ({model.adapter.kernels}): {calls:.0f} calls a token in {len(files)} files; {most}")


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    main(*sys.argv[1:])
