"""`quicksilver generate`: continue a prompt under a plan."""

import sys
from typing import Any

import click

from quicksilver.cli.common import check_kernels, kernels_option, model_options, open_model, own_lines
from quicksilver.errors import InputError, QuickSilverError, first_line

_COLDEST = 1e-3  # below this a float32 softmax over logits / temperature is greedy or overflows


@click.command("generate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.argument("prompt")
@click.option("--plan", default="dense", show_default=True, help="A preset's name or a plan file.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the k most likely tokens.")
@click.option("--top-p", type=float, help="Nucleus sampling.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of sampling.")
@click.option("--stats", is_flag=True, help="Print what ran, on stderr.")
@model_options
@kernels_option
def command(
    model: str,
    prompt: str,
    plan: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stats: bool,
    kernels: Any,
    **loading: Any,
) -> None:
    """Continue PROMPT ("-" reads it from stdin); the text goes to stdout, statistics to stderr.

    \b
    Examples:
      quicksilver generate ref-llama "The river rises in" --plan settled --stats
      quicksilver generate ref-llama - --temperature 0.8 --top-p 0.95 --seed 1 < prompt.txt
    """
    from quicksilver.measure.texts import is_encodable

    sampling = _sampling(temperature, top_k, top_p)
    text = _read_stdin() if prompt == "-" else prompt
    if not is_encodable(text):
        raise InputError("the prompt is not UTF-8 text")
    loaded, tokenizer = open_model(model, plan, **loading, kernels=kernels)
    check_kernels(kernels, model, loaded)
    _check_folder_settings(loaded.generation_config, model)
    encoded = tokenizer(text, return_tensors="pt")
    length, limit = encoded.input_ids.shape[1], loaded.adapter.spec.max_positions
    if not length:
        raise InputError("the prompt is empty")
    if length >= limit:
        raise InputError(f"the prompt's {length} tokens fill the model's context of {limit}")
    if max_new_tokens > limit - length:
        print(f"quicksilver: note: only {limit - length} tokens fit the model's context", file=sys.stderr)
    settings = {"max_new_tokens": min(max_new_tokens, limit - length), "seed": seed, **sampling}
    generated, seconds = _generate(loaded, tokenizer, encoded, settings)
    if stats:
        speed = f"time            {seconds:.2f} s, {generated / seconds:.1f} new tokens/s, prefill included"
        print(f"\n{loaded.stats.summary()}\n{speed}", file=sys.stderr)


def _sampling(temperature: float, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    """Return the settings of sampling, or of greedy decoding; refuse what would be neither."""
    if temperature != 0.0 and not _COLDEST <= temperature < float("inf"):
        raise InputError(f"--temperature {temperature} must be 0 (greedy) or at least {_COLDEST}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise InputError(f"--top-p {top_p} must be above 0 and at most 1")
    if temperature:
        return {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    if top_k is not None or top_p is not None:
        raise InputError("--top-k and --top-p need --temperature above 0")
    return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}


def _check_folder_settings(config: Any, model: str) -> None:
    """Refuse what a model's generation settings ask for and one streamed continuation is not."""
    asked = config.num_return_sequences
    if asked is not None and asked != 1:
        raise InputError(
            f"{model}: generation_config.json asks for num_return_sequences={asked}, and this command writes one"
            " continuation; take the setting out of the file, or generate from Python"
        )


def _read_stdin() -> str:
    from quicksilver.measure.texts import decode

    with own_lines():
        return decode(sys.stdin.buffer.read(), "the prompt on stdin")


def _generate(model: Any, tokenizer: Any, encoded: Any, settings: dict[str, Any]) -> tuple[int, float]:
    """Stream the continuation to stdout; return how many tokens it has, and the seconds it took."""
    import time

    from transformers import TextStreamer

    class Continuation(TextStreamer):
        """Ends the line of a text, where there is one: not where an error is all that there is to say."""

        began = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.began = self.began or bool(text)
            if self.began:
                super().on_finalized_text(text, stream_end)

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    begin = time.perf_counter()
    try:
        output = model.generate(
            input_ids=encoded.input_ids.to(model.device),
            attention_mask=encoded.attention_mask.to(model.device),
            pad_token_id=pad,
            streamer=Continuation(tokenizer, skip_prompt=True, skip_special_tokens=True),
            tokenizer=tokenizer,  # which stop strings need
            return_dict_in_generate=False,
            **settings,
        )
    except QuickSilverError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ImportError) as error:  # transformers', of the settings
        raise InputError(
            f"cannot generate with the settings of the model's generation_config.json: {first_line(error)}"
        ) from None
    return output.shape[1] - encoded.input_ids.shape[1], time.perf_counter() - begin
