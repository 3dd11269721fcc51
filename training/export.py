"""Turn a training checkpoint into a Hugging Face folder.

The folder loads with plain `AutoModelForCausalLM`; measuring it is left to `bits_per_byte.py`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig

from training.checkpoint import list_checkpoints, load_model, read_state
from training.common import InputError, load_tokenizer, run_main, say
from training.models import build_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def find_checkpoint(run: Path) -> Path:
    """Return `run` if it is a checkpoint itself, else the newest checkpoint in it.

    Raises:
        InputError: there is none.
    """
    if (run / "state.json").is_file():
        return run
    found = list_checkpoints(run) if run.is_dir() else []
    if not found:
        raise InputError(f"no checkpoint in {run}")
    return found[-1]


def copy_tokenizer(source: Path, target: Path, max_length: int) -> None:
    """Copy the tokenizer's own files, or have transformers write them when there is no tokenizer.json."""
    tokenizer = load_tokenizer(source)
    if (source / "tokenizer.json").is_file():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    else:
        tokenizer.model_max_length = max_length
        tokenizer.save_pretrained(target)


def export(run: Path, tokenizer: Path, out: Path, dtype: str) -> Path:
    """Write the newest checkpoint of `run` to the folder `out`, complete or not at all.

    Raises:
        InputError: no checkpoint, another tokenizer's vocabulary, or `out` exists and is not a model folder.
    """
    checkpoint = find_checkpoint(run)
    state = read_state(checkpoint)
    if len(load_tokenizer(tokenizer)) != state["vocab_size"]:
        raise InputError(f"{tokenizer} is not the tokenizer this model was trained with")
    if out.exists() and not (out / "config.json").is_file():
        raise InputError(f"{out} exists and is not a model folder; choose another")
    config = state["config"]
    model = build_model(config["architecture"], config["model"], state["vocab_size"], state["eos_token_id"])
    load_model(checkpoint, model)
    model.config.use_cache = True
    eos = state["eos_token_id"]
    model.generation_config = GenerationConfig(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos)
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.to(DTYPES[dtype]).save_pretrained(temporary)
    copy_tokenizer(tokenizer, temporary, model.config.max_position_embeddings)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder (its newest checkpoint) or one checkpoint")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder used for packing")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    args = parser.parse_args()
    folder = export(args.run, args.tokenizer, args.out, args.dtype)
    size = (folder / "model.safetensors").stat().st_size
    say(f"{folder}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    run_main(main)
