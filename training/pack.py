"""Turn text files into token arrays: `train.npy` and `validation.npy` (uint16), documents ended by EOS.

Training and evaluation read these arrays; nothing here knows about models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from training.common import InputError, load_tokenizer, read_documents, replace_file, run_main, say

DOCUMENTS_PER_BATCH = 256


def encode_documents(documents: list[str], tokenizer) -> list[np.ndarray]:
    """Encode each document and append the EOS token; returns one uint16 array per document."""
    if len(tokenizer) > 2**16:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens; uint16 packing holds at most 65536")
    arrays = []
    for start in range(0, len(documents), DOCUMENTS_PER_BATCH):
        batch = documents[start : start + DOCUMENTS_PER_BATCH]
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        arrays += [np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16) for ids in encoded]
        if len(arrays) % (DOCUMENTS_PER_BATCH * 4) == 0:
            say(f"{len(arrays)} of {len(documents)} documents")
    return arrays


def split_validation(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split off the last documents, holding about `fraction` of the characters (at least one document)."""
    if len(documents) < 2:
        raise InputError("at least two documents are needed: one to train on, one to validate")
    wanted = fraction * sum(map(len, documents))
    held, count = 0, 0
    while count < len(documents) - 1 and (count == 0 or held < wanted):
        count += 1
        held += len(documents[-count])
    return documents[:-count], documents[-count:]


def pack(inputs: list[Path], tokenizer_folder: Path, out: Path, fraction: float, whole_files: bool) -> dict:
    """Write the packed arrays and `pack.json` (sizes and sources) into `out`; returns the sizes."""
    tokenizer = load_tokenizer(tokenizer_folder)
    training, validation = split_validation(list(read_documents(inputs, whole_files)), fraction)
    out.mkdir(parents=True, exist_ok=True)
    facts: dict = {
        "sources": [path.name for path in inputs],
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }
    for name, documents in (("train", training), ("validation", validation)):
        tokens = np.concatenate(encode_documents(documents, tokenizer))
        with open(out / f"{name}.npy.tmp", "wb") as handle:
            np.save(handle, tokens)
        (out / f"{name}.npy.tmp").replace(out / f"{name}.npy")
        facts[name] = {
            "documents": len(documents),
            "tokens": int(tokens.size),
            "bytes": sum(len(text.encode()) for text in documents),
        }
    replace_file(out / "pack.json", lambda path: path.write_text(json.dumps(facts, indent=1) + "\n"))
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", type=Path, help="UTF-8 text files, plain or .xz")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the arrays")
    parser.add_argument("--validation", type=float, default=0.005, help="share kept from the end (0.005)")
    parser.add_argument("--whole-files", action="store_true", help="one document per file, not per block")
    args = parser.parse_args()
    if not 0 < args.validation < 1:
        raise InputError("--validation must lie between 0 and 1")
    facts = pack(args.inputs, args.tokenizer, args.out, args.validation, args.whole_files)
    print(json.dumps(facts))


if __name__ == "__main__":
    run_main(main)
