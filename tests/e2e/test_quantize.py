"""Quantized models on disk: what is saved comes back bit for bit, and nothing half-written or damaged is used."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, LlamaConfig

import quicksilver
from quicksilver.core.sources import embedded_models
from quicksilver.errors import InputError, ModelError
from quicksilver.families.quantize import is_tied, quantize_model
from quicksilver.loading.quantized import save_quantized
from quicksilver.weights import AnyPrecisionEmbedding, AnyPrecisionLinear, AnyPrecisionSplit
from quicksilver.weights.config import LAYERS_ONLY, QuantizationConfig
from tests import HANGS, tiny
from tests.e2e.conftest import Hub, ModelFolder, Outcome, assert_refusal

Cli = Callable[..., Outcome]
Refused = Callable[..., str]
ModelCopy = Callable[..., ModelFolder]
NAMES = (*tiny.FAMILIES, *tiny.VARIANTS)
ALL: dict[str, Any] = {}
NONE, HEAD = {"head": False, "embeddings": False}, {"embeddings": False}


def quantized(name: str | Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return a quantized model of a tiny model's name or a configuration; buffers stay in float32, as when loaded."""
    model = copy.deepcopy(tiny.model(name)) if isinstance(name, str) else tiny.from_config(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    quantize_model(model, QuantizationConfig(**options))
    return model


def logits(model: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(tiny.token_ids(40)[None]).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A quantized Llama with its tokenizer."""
    save_quantized(quantized("llama"), tmp_path / "quantized", tiny.tokenizer())
    return tmp_path / "quantized"


@pytest.mark.parametrize(
    ("name", "options"), tiny.on_telling((ALL, NONE, HEAD, {**NONE, "group_size": 128}), (ALL,), NAMES), ids=str
)
def test_a_reloaded_model_is_the_saved_one(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model = quantized(name, **options)
    save_quantized(model, tmp_path / "quantized")
    loaded = quicksilver.load(tmp_path / "quantized").model
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(loaded.lm_head, AnyPrecisionLinear) == options.get("head", True)
    assert isinstance(loaded.get_input_embeddings(), AnyPrecisionEmbedding) == options.get("embeddings", True)
    tied = tiny.model(name).config.tie_word_embeddings and options != HEAD
    assert loaded.config.tie_word_embeddings == tied == is_tied(loaded)


@pytest.mark.parametrize("options", [NONE, ALL], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2-tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(tmp_path: Path, name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The weights that are not quantized are stored in the model's own dtype, and loaded in the one asked for."""
    model = quantized(name, dtype, **options)
    save_quantized(model, tmp_path / "quantized")
    for asked in (dtype, "auto"):
        assert torch.equal(logits(quicksilver.load(tmp_path / "quantized", dtype=asked).model), logits(model))
    widened = quicksilver.load(tmp_path / "quantized").model
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    assert torch.equal(logits(widened), logits(model.float()))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=36, n_inner=50, n_head=3, n_layer=2, vocab_size=301, n_positions=64),
        LlamaConfig(
            hidden_size=42,
            intermediate_size=67,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            vocab_size=301,
            max_position_embeddings=64,
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_widths_that_are_no_multiple_of_the_group(tmp_path: Path, config: Any) -> None:
    plain = logits(tiny.from_config(config))
    model = quantized(config, **ALL)
    assert (logits(model) - plain).abs().max() < 0.1 * plain.abs().max()
    save_quantized(model, tmp_path / "quantized")
    assert torch.equal(logits(quicksilver.load(tmp_path / "quantized").model), logits(model))


def test_shards(tmp_path: Path) -> None:
    model = quantized("gpt2", **ALL)
    save_quantized(model, tmp_path / "quantized", max_shard_size="20KB")
    assert len(list((tmp_path / "quantized").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(quicksilver.load(tmp_path / "quantized").model), logits(model))


def test_an_earlier_download(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: Hub) -> None:
    repo = tmp_path / "cache" / "models--someone--quantized"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    shutil.copytree(folder, repo / "snapshots" / "c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert torch.equal(logits(quicksilver.load("someone/quantized").model), logits(quicksilver.load(folder).model))
    assert quicksilver.load_tokenizer("someone/quantized")("a").input_ids
    assert no_hub.calls == 2  # whoever has no network is not kept waiting by more


def test_files_can_be_read_by_others(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o044 for path in folder.iterdir()} == {0o044}


def test_biases_and_parts() -> None:
    plain, model = tiny.model("gpt2"), quantized("gpt2", **NONE)
    c_attn = model.transformer.h[1].attn.c_attn
    assert isinstance(c_attn, AnyPrecisionSplit)
    assert torch.equal(torch.cat([part.bias for part in c_attn.parts]), plain.transformer.h[1].attn.c_attn.bias)
    joined = torch.cat([part.dequantize() for part in c_attn.parts])
    assert (joined - plain.transformer.h[1].attn.c_attn.weight.T).abs().max() < 0.01


@pytest.mark.parametrize("options", [[], ["--keep-head"], ["--calibration", "book.txt"]])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_every_command_takes_the_folder(
    cli: Cli, tiny_model_dir: Any, text_file: Path, tmp_path: Path, family: str, options: list[str]
) -> None:
    target = tmp_path / "out"
    options = [str(text_file) if option == "book.txt" else option for option in options]
    made = cli("quantize", tiny_model_dir(family), "-o", target, *options)
    assert (made.status, made.said) == (0, [])
    assert made.out.splitlines()[-1] == f"written to {target}"
    assert not list(tmp_path.glob(".*"))
    method = json.loads((target / "config.json").read_text())["quantization_config"]["method"]
    assert method == ("compensated" if "--calibration" in options else "nearest")
    evaluated = cli("eval", target, "--text", text_file, "--context", 32)
    assert (evaluated.status, evaluated.said) == (0, [])
    generated = cli("generate", target, "The river", "--max-new-tokens", 3)
    assert (generated.status, generated.said) == (0, [])


def test_the_embedded_model_takes_at_most_8_6_bits(cli: Cli, tmp_path: Path) -> None:
    if "ref-llama" not in embedded_models():
        pytest.skip("this checkout holds no embedded model")
    made = cli("quantize", "ref-llama", "-o", tmp_path / "out")
    assert made.status == 0, made.err
    codes = next(line for line in made.out.splitlines() if line.startswith("codes"))
    assert 8.0 < float(codes.split()[1]) <= 8.6
    quantized_weights = int(made.out.split(" weights;")[0].split()[-1].replace(",", ""))
    model = quicksilver.load(tmp_path / "out", dtype="auto").model
    others = sum(p.numel() * p.element_size() for p in model.parameters())
    file = tmp_path / "out" / "model.safetensors"
    size = file.stat().st_size - int.from_bytes(file.read_bytes()[:8], "little")  # of names
    assert 8 * (size - others) / quantized_weights <= 8.6


@pytest.mark.parametrize("how", ["truncated", "header", "data", "gone"])
def test_damaged_weights(refused: Refused, folder: Path, text_file: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    name = "model.layers.2.mlp.up_proj.high"
    data = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0]
    if how == "truncated":
        del content[-100:]
    elif how == "header":
        content[content.index(b"up_proj.high")] ^= 1
    else:
        content[data + 3] ^= 4
    weights.write_bytes(content)
    if how == "gone":
        weights.unlink()
    for command in (("eval", folder, "--text", text_file), ("generate", folder, "Once")):
        refused(*command, names=(folder, "model.safetensors", name if how == "data" else ""))


def test_a_file_holds_the_buffers_of_a_map(folder: Path) -> None:
    tensors, module = load_file(folder / "model.safetensors"), quantized("llama").model.layers[1].mlp.down_proj
    names = [name for name in tensors if name.startswith("model.layers.1.mlp.down_proj.")]
    parts = ("block_steps", "form", "high", "low", "steps", "zeros")
    assert sorted(names) == [f"model.layers.1.mlp.down_proj.{part}" for part in parts]
    for part in parts:
        assert torch.equal(tensors[f"model.layers.1.mlp.down_proj.{part}"], module.get_buffer(part))


def test_a_table_that_head_and_embedding_share_is_stored_once(tmp_path: Path) -> None:
    save_quantized(quantized("gpt2"), tmp_path / "quantized")
    names = load_file(tmp_path / "quantized" / "model.safetensors").keys()
    assert "transformer.wte.high" in names
    assert not [name for name in names if name.startswith("lm_head")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(refused: Refused, tmp_path: Path, text_file: Path, value: float) -> None:
    """A file that is whole may still hold nonsense."""
    model = quantized("llama")
    model.model.layers[1].mlp.up_proj.block_steps.view(torch.float16)[0, 3] = value
    save_quantized(model, tmp_path / "quantized", tiny.tokenizer())
    names = (tmp_path / "quantized", "'model.layers.1.mlp.up_proj.block_steps' holds NaN or infinite values")
    refused("eval", tmp_path / "quantized", "--text", text_file, names=names)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"group_size": 48}, ("config.json", "group_size", "48")),
        ({"group_size": "32"}, ("config.json", "group_size")),
        ({"group_size": None}, ("config.json", "group_size", "None")),
        ({"version": 1}, ("config.json", "version", "earlier", "quantize the model again")),
        ({"version": 3}, ("config.json", "version", "3")),
        ({"method": "magic"}, ("config.json", "magic")),
        ({"colour": "red"}, ("config.json", "colour")),
        ({"head": False}, ("lm_head",)),
        ({"head": 1}, ("config.json", "head")),
        ({"embeddings": False}, ("embed_tokens",)),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(
    refused: Refused, folder: Path, text_file: Path, change: dict[str, Any], names: tuple[str, ...]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    refused("eval", folder, "--text", text_file, names=(folder, *names))


@pytest.mark.parametrize("change", [{"hidden_size": 40}, {"num_hidden_layers": 3}, {"hidden_act": "nonesuch"}], ids=str)
def test_a_model_that_does_not_fit_its_weights(
    refused: Refused, folder: Path, text_file: Path, change: dict[str, Any]
) -> None:
    refused("eval", ModelFolder(folder).edit_config(**change), "--text", text_file, names=(folder,))


def test_a_generation_configuration_that_makes_no_sense(refused: Refused, folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")
    refused("generate", folder, "Once", names=(folder,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.layers.0.mlp.up_proj.weight"), ("gpt2", "transformer.h.3.attn.c_attn.weight")],
)
def test_a_weight_that_is_not_finite(cli: Cli, model_copy: ModelCopy, family: str, name: str, value: float) -> None:
    folder = model_copy(family).edit_weights(lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    assert_refusal(cli("quantize", folder, "-o", folder / "out"), folder, name, "NaN")
    assert not (folder / "out").exists()


def test_nest_changes_nothing_where_a_weight_is_not_finite() -> None:
    model = tiny.from_config(tiny.CONFIGS["llama"]())
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[2, 2] = float("nan")
    with pytest.raises(ModelError, match=r"'model\.layers\.3\.mlp\.down_proj\.weight' holds NaN or infinite values"):
        quantize_model(model, LAYERS_ONLY)
    assert not any(isinstance(module, AnyPrecisionLinear) for module in model.modules())


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_target_that_exists_is_left_alone(cli: Cli, tiny_model_dir: Any, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    assert_refusal(cli("quantize", tiny_model_dir("llama"), "-o", target), target, "exists already")
    with pytest.raises(InputError, match="exists already"):
        save_quantized(quantized("llama"), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert target.is_symlink() or (target / "mine.txt" if kind == "folder" else target).read_text() == "mine"


def test_an_empty_folder_is_taken(cli: Cli, tiny_model_dir: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert cli("quantize", tiny_model_dir("llama"), "-o", tmp_path / "out").status == 0
    assert quicksilver.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--calibration", "nowhere.txt"], ["nowhere.txt"]),
        (["--group-size", "48"], ["48"]),
        (["--head"], ["--head"]),
        (["--device", "tpu"], ["tpu"]),
    ],
    ids=str,
)
def test_options_that_do_not_go(
    cli: Cli, tiny_model_dir: Any, tmp_path: Path, options: list[str], names: list[str]
) -> None:
    assert_refusal(cli("quantize", tiny_model_dir("gpt2"), "-o", tmp_path / "out", *options), *names)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantized(cli: Cli, folder: Path, tiny_model_dir: Any, tmp_path: Path) -> None:
    assert_refusal(cli("quantize", folder, "-o", tmp_path / "out"), folder, "quantized already")
    assert_refusal(cli("quantize", "./nowhere", "-o", tmp_path / "out"), "./nowhere")
    target = tmp_path / "no" / "parent"
    assert_refusal(cli("quantize", tiny_model_dir("llama"), "-o", target), target, "does not exist")


def test_a_tokenizer_of_another_model(cli: Cli, model_copy: ModelCopy, text_file: Path, tmp_path: Path) -> None:
    folder = model_copy("llama").edit_config(vocab_size=100)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    ModelFolder(folder).edit_weights(lambda tensors: tensors.update({n: tensors[n][:100].clone() for n in names}))
    refusal = cli("quantize", folder, "-o", tmp_path / "out", "--calibration", text_file)
    assert_refusal(refusal, "token id", "vocabulary of 100")


def test_a_model_without_a_tokenizer(cli: Cli, model_copy: ModelCopy, tmp_path: Path) -> None:
    folder = model_copy("gpt2").path
    for path in folder.glob("*token*"):
        path.unlink()
    made = cli("quantize", folder, "-o", tmp_path / "out")
    assert made.status == 0
    assert "no tokenizer" in made.err
    assert quicksilver.load(tmp_path / "out")


MOMENTS = (
    "pathlib.Path.mkdir",
    "quicksilver.families.quantize.quantize",
    "quicksilver.loading.quantized.TensorWriter.write",
    "quicksilver.loading.quantized.TensorWriter.__exit__",
    "transformers.GenerationConfig.to_json_file",
)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt even where the process that started the tests has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_killed_run_leaves_nothing_that_loads(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tiny_model_dir: Any, tmp_path: Path, moment: str, sent: signal.Signals
) -> None:
    module, _, name = moment.rpartition(".")
    real = getattr(pkgutil.resolve_name(module), name)

    def strike(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        os.kill(os.getpid(), sent)

    def impatient(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # once more, while it cleans up
        real_rmtree(*args, **kwargs)

    real_rmtree = shutil.rmtree
    monkeypatch.setattr("quicksilver.loading.quantized.shutil.rmtree", impatient)
    monkeypatch.setattr(moment, strike)
    arguments = ("quantize", tiny_model_dir("llama"), "-o", tmp_path / "out")
    if sent is not signal.SIGKILL:
        outcome = cli(*arguments)
        assert (outcome.status, outcome.said) == (128 + sent, ["quicksilver: interrupted"])
        assert list(tmp_path.iterdir()) == []
    else:
        child = multiprocessing.get_context("fork").Process(target=cli, args=arguments)
        child.start()
        child.join(timeout=HANGS)
        assert child.exitcode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.rglob("config.json"))
