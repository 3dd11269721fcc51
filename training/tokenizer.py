"""Train a byte-level BPE tokenizer on text files.

To use an existing tokenizer, skip this step and give its folder to `pack.py`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from training.common import InputError, read_documents, run_main, say

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257  # 256 bytes and the end-of-text token


def train_tokenizer(inputs: list[Path], vocab_size: int, out: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` to `out`; end-of-text is token 0 (BOS and EOS).

    Raises:
        InputError: a text is missing or empty, or the vocabulary is too small or too large.
    """
    if not SMALLEST <= vocab_size <= 2**16:
        raise InputError(f"--vocab-size must lie between {SMALLEST} and 65536")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_documents(inputs), trainer)
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json.tmp"))
    os.replace(out / "tokenizer.json.tmp", out / "tokenizer.json")
    say(f"{tokenizer.get_vocab_size()} tokens in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", type=Path, help="UTF-8 text files, plain or .xz")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--max-length", type=int, default=1024, help="context recorded with the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    train_tokenizer(args.inputs, args.vocab_size, args.out, args.max_length)


if __name__ == "__main__":
    run_main(main)
