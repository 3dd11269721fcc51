"""The training scripts on tiny data: packing, resuming, exporting, scoring."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests import tolerances  # noqa: E402
from training import pack as pack_script  # noqa: E402
from training.bits_per_byte import score_text, windows  # noqa: E402
from training.checkpoint import list_checkpoints, load_model  # noqa: E402
from training.common import InputError, run_main  # noqa: E402
from training.config import OptimConfig, ScheduleConfig, StageConfig, TrainConfig, load_config  # noqa: E402
from training.data import WindowSampler  # noqa: E402
from training.export import export  # noqa: E402
from training.models import build_model  # noqa: E402
from training.optim import build_optimizers, hidden_matrices, orthogonalize  # noqa: E402
from training.schedule import lr_factor, share_done, stage_at  # noqa: E402
from training.tokenizer import train_tokenizer  # noqa: E402
from training.train import build_trainer  # noqa: E402

MODELS = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
}


def tiny_config(architecture: str = "llama", **changes: object) -> TrainConfig:
    config = TrainConfig(
        architecture=architecture,
        model=MODELS[architecture],
        stages=(StageConfig(0.5, 16, 128), StageConfig(1.0, 32, 128, micro_tokens=64)),
        steps=8,
        precision="fp32",
        token_dropout=0.1,
        log_every=1,
        eval_every=4,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt, a tokenizer trained on it, and the packed tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["river", "stone", "über", "cloud", "seven", "kept", "the", "of", "and", "light", "猫"]
    documents = [" ".join(rng.choices(words, k=60)) + ".\nSecond line." for _ in range(40)]
    (folder / "text.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    train_tokenizer([folder / "text.txt"], 300, folder / "tokenizer", max_length=64)
    pack_script.pack([folder / "text.txt"], folder / "tokenizer", folder / "data", 0.1, whole_files=False)
    return folder


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def train(corpus: Path, out: Path, config: TrainConfig, stop_at: int = 0, resume: bool = False, **kwargs: float):
    trainer = build_trainer(config, corpus / "data", out, torch.device("cpu"), resume=resume, **kwargs)
    trainer.run(stop_at)
    return trainer


def test_packing_round_trip(corpus: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    facts = json.loads((corpus / "data" / "pack.json").read_text())
    parts = []
    for name in ("train", "validation"):
        tokens = np.load(corpus / "data" / f"{name}.npy")
        assert tokens.dtype == np.uint16
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokens.size == facts[name]["tokens"]
        texts = tokenizer.decode(tokens.tolist()).split("<|endoftext|>")[:-1]
        assert len(texts) == facts[name]["documents"]
        assert sum(len(text.encode()) for text in texts) == facts[name]["bytes"]
        parts += texts
    assert "\n\n".join(parts) + "\n" == (corpus / "text.txt").read_text(encoding="utf-8")


def test_sampler_covers_an_epoch_once_at_any_length() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    for seq_len in (16, 64):
        sampler = WindowSampler(tokens, 64, seed=3, device=torch.device("cpu"))
        seen, targets = [], []
        for at in range(0, sampler.epoch_tokens, 64):
            inputs, following = sampler.batch(at, 64, seq_len)
            assert inputs.shape == (64 // seq_len, seq_len)
            seen.append(inputs.flatten())
            targets.append(following.flatten())
        flat = torch.cat(seen)
        assert len(flat.unique()) == len(flat) == sampler.epoch_tokens
        assert torch.equal(torch.cat(targets), flat + 1)


def test_short_windows_of_one_stretch_are_spread_over_the_epoch() -> None:
    tokens = np.arange(60_000, dtype=np.uint16)
    sampler = WindowSampler(tokens, 64, seed=0, device=torch.device("cpu"))
    inputs, _ = sampler.batch(0, sampler.epoch_tokens // 64 * 64, 16)
    visited = torch.argsort(inputs[:, 0])  # when each window, in the order of the text, was visited
    gaps = (visited[1:] - visited[:-1]).abs().float() / len(visited)
    assert gaps.mean() == pytest.approx(1 / 3, abs=0.02)  # as for positions drawn at random


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_resuming_changes_nothing(corpus: Path, tmp_path: Path, architecture: str) -> None:
    config = tiny_config(architecture)
    whole = train(corpus, tmp_path / "whole", config)
    train(corpus, tmp_path / "parts", config, stop_at=3)
    resumed = train(corpus, tmp_path / "parts", config, resume=True)
    for expected, found in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)
    last_loss = [[row["loss"] for row in read_log(tmp_path / name) if "loss" in row][-1] for name in ("whole", "parts")]
    assert last_loss[0] == last_loss[1]
    assert (tmp_path / "whole" / "curve.png").stat().st_size > 1000
    with pytest.raises(InputError, match="--resume"):
        build_trainer(config, corpus / "data", tmp_path / "whole", torch.device("cpu"))


def test_training_lowers_the_loss(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, tiny_config(steps=40, token_dropout=0.0))
    losses = [row["loss"] for row in read_log(tmp_path) if "loss" in row]
    assert losses[0] == pytest.approx(math.log(300), rel=0.1)
    assert losses[-1] < 0.75 * losses[0]


def test_time_limit_ends_the_run_with_the_rate_decayed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by ten milliseconds whenever it is looked at."""
    clock = SimpleNamespace(monotonic=itertools.count(step=0.01).__next__)
    monkeypatch.setattr("training.train.time", clock)
    config = tiny_config(steps=0, eval_every=10_000)
    trainer = train(corpus, tmp_path, config, time_limit=1.0)
    assert 1.0 <= trainer.progress.elapsed < 1.1
    factors = [row["lr_factor"] for row in read_log(tmp_path) if "lr_factor" in row]
    assert factors[-1] < 0.2
    again = train(corpus, tmp_path, config, resume=True, time_limit=1.0)
    assert again.progress.step == trainer.progress.step


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_export_gives_the_same_logits(corpus: Path, tmp_path: Path, architecture: str) -> None:
    trainer = train(corpus, tmp_path / "run", tiny_config(architecture, steps=2))
    folder = export(tmp_path / "run", corpus / "tokenizer", tmp_path / "model", "bfloat16")
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the river of stone", return_tensors="pt").input_ids
    expected = trainer.model.to(torch.bfloat16).eval()(inputs).logits
    assert torch.equal(loaded.eval()(inputs).logits, expected)
    assert loaded.generate(inputs, max_new_tokens=3, do_sample=False).shape[1] <= inputs.shape[1] + 3
    assert export(tmp_path / "run", corpus / "tokenizer", tmp_path / "model", "float16") == folder
    assert not (tmp_path / "model.tmp").exists()
    with pytest.raises(InputError, match="not a model folder"):
        export(tmp_path / "run", corpus / "tokenizer", tmp_path / "run", "bfloat16")


def test_loading_another_models_weights_fails(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, tiny_config(steps=1))
    other = build_model("llama", {**MODELS["llama"], "num_hidden_layers": 3}, 300, 0)
    with pytest.raises(InputError, match="another model"):
        load_model(list_checkpoints(tmp_path)[-1], other)


@pytest.mark.parametrize(("length", "context", "stride"), [(1, 8, 4), (2, 8, 4), (8, 8, 4), (9, 8, 4), (30, 8, 3)])
def test_windows_score_each_token_once(length: int, context: int, stride: int) -> None:
    scored = [at for _, end, first in windows(length, context, stride) for at in range(first, end)]
    assert scored == list(range(1, length))
    assert all(end - begin <= context for begin, end, _ in windows(length, context, stride))


def test_bits_per_byte_matches_one_long_window(corpus: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    torch.manual_seed(0)
    model = build_model("llama", MODELS["llama"], 300, 0).eval()
    text = "the river kept seven über stones"
    score = score_text(model, tokenizer, text, context=64, stride=32)
    ids = torch.tensor([[0, *tokenizer(text).input_ids]])
    mean = model(input_ids=ids, labels=ids).loss.item()
    assert score.tokens == ids.shape[1] - 1
    assert score.bits_per_byte == pytest.approx(
        mean * score.tokens / math.log(2) / len(text.encode()), rel=tolerances.LOSS_SHARE
    )


def test_orthogonalize_flattens_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((3, 24, 24), (2, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        # These coefficients leave singular values near 1, not at it; tiny ones stay lower.
        assert values.max() < 1.35
        assert values.median() > 0.6


def test_every_parameter_has_one_optimizer_and_fused_blocks_move_apart() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    optimizers = build_optimizers(model, OptimConfig())
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    assert len(hidden_matrices(model)) == 4
    weight = model.transformer.h[0].attn.c_attn.weight  # [in, 3 * out]
    before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
    optimizers[0].step()
    moved = (before - weight.detach())[:, :16] / 0.02
    update = weight.grad[:, :16].mT * (1 - 0.95**2)
    torch.testing.assert_close(
        moved.mT, orthogonalize(update[None])[0].float(), atol=tolerances.ORTHOGONAL_BFLOAT16, rtol=0
    )


def test_schedule() -> None:
    schedule = ScheduleConfig(warmup_steps=4, decay_from=0.5)
    assert lr_factor(0, 0.0, schedule) == 0.25
    assert lr_factor(10, 0.4, schedule) == 1.0
    assert lr_factor(10, 0.75, schedule) == pytest.approx(0.5)
    cosine = dataclasses.replace(schedule, decay="cosine")
    assert lr_factor(10, 1.0, cosine) == pytest.approx(0.0)
    assert share_done(5, 10, 0.0, 0.0) == 0.5
    assert share_done(5, 10, 9.0, 10.0) == 0.9
    stages = (StageConfig(0.5, 16, 128), StageConfig(1.0, 32, 128))
    assert [stage_at(share, stages).seq_len for share in (0.0, 0.5, 1.0)] == [16, 32, 32]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "training" / "configs").glob("*.toml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_shipped_configurations_load(path: Path, device: str) -> None:
    config = load_config(path, device)
    with torch.device("meta"):
        model = build_model(config.architecture, config.model, 8192, 0)
    assert model.config.num_hidden_layers >= 10
    assert model.config.max_position_embeddings == 1024
    assert 2 * sum(p.numel() for p in model.parameters()) < 21e6  # bytes; two such models stay under 40 MB


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [", "bad.toml"),
        ('architecture = "llama"\nwidth = 3\n[model]\n', "unknown key width"),
        (
            'architecture = "llama"\n[model]\n[[stages]]\nuntil = 0.5\nseq_len = 8\nbatch_tokens = 8\n',
            "rise to 1.0",
        ),
    ],
)
def test_bad_configurations_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "bad.toml", "cpu")


def test_bad_input_ends_with_status_2(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    for name in ("missing.txt", "empty.txt"):
        options = ["--tokenizer", str(corpus / "tokenizer"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["pack", str(tmp_path / name), *options])
        with pytest.raises(SystemExit) as stop:
            run_main(pack_script.main)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()
