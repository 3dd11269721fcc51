"""Sample documents from a model, for evaluating it on text of its own domain.

Sampling is at temperature 1 over the whole vocabulary, seeded; judging the text is not done here.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from quicksilver.core.files import write_atomically
from quicksilver.errors import QuickSilverError
from quicksilver.loading.load import load, load_tokenizer


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="JSON lines to write.")
@click.option("--documents", default=64, show_default=True, help="Number of documents.")
@click.option("--tokens", default=300, show_default=True, help="Longest document, in tokens.")
@click.option("--seed", default=0, show_default=True)
def main(model: str, output: str, documents: int, tokens: int, seed: int) -> None:
    """Write documents sampled from MODEL, each begun by its BOS token.

    \b
    Example:
      python -m benchmarks.sample_text stories3M -o stories.jsonl --documents 100 --seed 1
    """
    try:
        loaded, tokenizer = load(model), load_tokenizer(model)
    except QuickSilverError as error:
        raise click.UsageError(str(error)) from None
    torch.manual_seed(seed)
    prompts = torch.full((documents, 1), tokenizer.bos_token_id)
    out = loaded.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.eos_token_id,
    )
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in out]
    write_atomically(Path(output), "".join(json.dumps({"text": text}) + "\n" for text in texts if text))


if __name__ == "__main__":
    main()
