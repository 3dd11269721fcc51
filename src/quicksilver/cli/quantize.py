"""`quicksilver quantize`: quantize a model's weights, so that 0 to 8 bits of one copy can be read."""

import sys
from pathlib import Path
from typing import Any

import click

from quicksilver.cli.common import calibration_windows, device_options, own_lines, prepare, progress, read_texts
from quicksilver.errors import InputError, ModelError

_CONTEXT = 2048
_GROUPS = ("16", "32", "64", "128")
_TOKENS = 32768
_ROUNDING = "--calibration, --group-size and --keep-head"


@click.command("quantize", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(), help="A new folder; every command takes it as MODEL.")
@click.option("--group-size", type=click.Choice(_GROUPS), default="32", show_default=True, help="Weights of one scale.")
@click.option("--calibration", type=click.Path(), help="A text; codes are chosen so that errors on it cancel out.")
@click.option("--calibration-tokens", type=click.IntRange(min=2), help=f"Of it, from the first (default: {_TOKENS}).")
@click.option("--keep-head", is_flag=True, help="Leave the head and the token embedding as floats.")
@device_options
def command(
    model: str,
    output: str,
    group_size: str,
    calibration: str | None,
    calibration_tokens: int | None,
    keep_head: bool,
    device: str,
    threads: int | None,
) -> None:
    """Quantize the weights of MODEL in 8-bit codes, and write it to a new folder.

    MODEL is an embedded model's name, a local folder, a GGUF file, or an id on the hub. The maps of its layers, its
    head and its token embedding are quantized; they are read at 8 bits unless a plan says otherwise. The codes of a
    GGUF file, and of a folder of GPTQ or AWQ, are taken over as they are.

    \b
    Examples:
      quicksilver quantize ref-llama -o ref-llama-quantized
      quicksilver quantize ./my-gpt2 -o my-gpt2-quantized --calibration book.txt
      quicksilver quantize ./my-qwen -o my-qwen-quantized --group-size 64 --keep-head
    """
    from quicksilver.core.files import check_new_folder

    if calibration_tokens is not None and calibration is None:
        raise InputError("--calibration-tokens is of no use without --calibration")
    check_new_folder(output)
    corpus = None if calibration is None else read_texts(calibration)[0]
    prepare(model, device, threads)
    from quicksilver.families.quantize import HEAD, check, quantize_model, quantized_names
    from quicksilver.loading.load import load_plain, load_taken_over
    from quicksilver.loading.quantized import quantize_and_save, save_quantized
    from quicksilver.weights.config import QuantizationConfig

    method = "nearest" if corpus is None else "compensated"
    config = QuantizationConfig(int(group_size), method, head=not keep_head, embeddings=not keep_head)
    with own_lines():
        taken, tokenizer = load_taken_over(model), _tokenizer(model, required=corpus is not None)
        loaded = load_plain(model, device) if taken is None else taken
    if taken is not None:
        if corpus is not None or config != QuantizationConfig():
            raise InputError(f"{model}: holds codes, which are taken over as they are; {_ROUNDING} are of no use")
        save_quantized(taken, output, tokenizer)
        _print_summary(taken, output)
        return
    check(loaded, config)
    names = quantized_names(loaded, config)
    hessians = None if corpus is None else _hessians(loaded, tokenizer, corpus, calibration_tokens, HEAD in names)
    with progress("matrices", len(names)) as advance:
        if hessians is None:
            quantize_and_save(loaded, config, output, tokenizer, on_map=advance)
        else:
            quantize_model(loaded, config, hessians, advance)
            save_quantized(loaded, output, tokenizer)
    _print_summary(loaded, output)


def _tokenizer(model: str, required: bool) -> Any:
    """Return a model's tokenizer; None, with a note, where it has none and none is needed."""
    from quicksilver.loading.load import load_tokenizer

    try:
        return load_tokenizer(model)
    except ModelError as error:
        if required:
            raise
        print(f"quicksilver: note: no tokenizer is written: {error}", file=sys.stderr)
        return None


def _hessians(model: Any, tokenizer: Any, corpus: Any, max_tokens: int | None, head: bool) -> Any:
    from quicksilver.calibrate.hessians import collect_hessians
    from quicksilver.families import registry

    limit, max_tokens = registry.adapt(model).spec.max_positions, max_tokens or _TOKENS
    windows, _ = calibration_windows(corpus, tokenizer, limit, _CONTEXT, max_tokens)
    with progress("calibration windows", len(windows)) as advance:
        return collect_hessians(model, windows, head, advance)


def _print_summary(model: Any, output: str) -> None:
    from quicksilver.weights import AnyPrecisionWeight

    found = [module for module in model.modules() if isinstance(module, AnyPrecisionWeight)]
    quantized = list({id(module.high): module for module in found}.values())  # one where two share a table
    weights = sum(module.num_inputs * module.num_outputs for module in quantized)
    bits = 8 * sum(module.code_bytes for module in quantized) / weights
    size = sum(path.stat().st_size for path in Path(output).glob("*.safetensors"))
    matrices = f"{len(quantized)} matrices, {weights:,} weights"
    sizes = ", ".join(str(size) for size in sorted({module.group_size for module in quantized}))
    print(f"quantized  {matrices}; {model.config.quantization_config['method']}, group size {sizes}")
    print(f"codes      {bits:.2f} bits per any-precision weight, scales included")
    print(f"file size  {size / 1e6:.1f} MB with the weights that stay as they were")
    print(f"written to {output}")
