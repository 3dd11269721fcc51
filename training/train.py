"""Train a model on packed tokens: the loop and its clock.

The model, the data order, the optimisers and the schedule have files of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from training.checkpoint import Progress, list_checkpoints, load_checkpoint, save_checkpoint
from training.common import InputError, run_main, say
from training.config import TrainConfig, load_config
from training.curve import draw_curve
from training.data import WindowSampler, load_tokens
from training.models import build_model, max_positions, scale_residual_outputs
from training.optim import build_optimizers, set_lr
from training.schedule import lr_factor, share_done, stage_at

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_loss(model: nn.Module, device: torch.device, precision: str) -> LossFunction:
    """Return a function from inputs and targets `[B, T]` to the mean loss in nats."""

    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            hidden_states = model.base_model(input_ids=inputs, use_cache=False)[0]  # [B, T, D]
            logits = model.lm_head(hidden_states)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return loss


@dataclass
class Trainer:
    """One run: what it trains on, what it has reached, and how long it may take."""

    config: TrainConfig
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    sampler: WindowSampler
    validation: torch.Tensor  # [N], int64, on the device
    validation_bytes_per_token: float
    out: Path
    device: torch.device
    facts: dict[str, Any]
    time_limit: float = 0.0
    progress: Progress = field(default_factory=Progress)
    stopping: bool = False

    def __post_init__(self) -> None:
        self.eager_loss = make_loss(self.model, self.device, self.config.precision)
        self.loss = torch.compile(self.eager_loss, dynamic=False) if self.config.compile else self.eager_loss
        self._started = time.monotonic() - self.progress.elapsed
        self._pending: list[torch.Tensor] = []
        self._logged = (self.progress.tokens_seen, time.monotonic())

    def share(self) -> float:
        """Share of the run that is over, 0 to 1."""
        self.progress.elapsed = time.monotonic() - self._started
        return share_done(self.progress.step, self.config.steps, self.progress.elapsed, self.time_limit)

    def run(self, stop_at: int = 0) -> None:
        """Train to the end of the run, or to step `stop_at`; leaves a checkpoint either way."""
        saved = time.monotonic()
        while (share := self.share()) < 1.0 and not self.stopping:
            self.step(share)
            if self.progress.step % self.config.log_every == 0:
                self.log(share)
            if self.progress.step % self.config.eval_every == 0:
                self.evaluate(share)
            if time.monotonic() - saved > self.config.checkpoint_seconds:
                self.save()
                saved = time.monotonic()
            if stop_at and self.progress.step >= stop_at:
                break
        self.share()
        self.save()
        self.evaluate(share)

    def step(self, share: float) -> None:
        """Take one optimiser step on the next batch of the stage in force."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.progress.step)  # dropout is the same after a resume
        stage = stage_at(share, self.config.stages)
        set_lr(self.optimizers, lr_factor(self.progress.step, share, self.config.schedule))
        inputs, targets = self.sampler.batch(self.progress.tokens_seen, stage.batch_tokens, stage.seq_len)
        inputs = self.drop_tokens(inputs)
        rows = (stage.micro_tokens or stage.batch_tokens) // stage.seq_len
        parts = list(zip(inputs.split(rows), targets.split(rows), strict=True))
        for part_inputs, part_targets in parts:
            loss = self.loss(part_inputs, part_targets) / len(parts)
            loss.backward()
            self._pending.append(loss.detach() * len(parts))
        if self.config.optim.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens_seen += inputs.numel()

    def drop_tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        """Replace a share of the inputs by random tokens (a regulariser for many epochs)."""
        rate = self.config.token_dropout
        if not rate:
            return inputs
        drop = torch.rand(inputs.shape, device=self.device) < rate
        noise = torch.randint(self.facts["vocab_size"], inputs.shape, device=self.device)
        return torch.where(drop, noise, inputs)

    def log(self, share: float) -> None:
        """Write the mean loss and the speed since the last line."""
        loss = torch.stack(self._pending).mean().item()
        self._pending.clear()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.progress.step}; lower the learning rate")
        tokens, now = self.progress.tokens_seen, time.monotonic()
        speed = (tokens - self._logged[0]) / max(now - self._logged[1], 1e-9)
        self._logged = (tokens, now)
        stage = stage_at(share, self.config.stages)
        factor = lr_factor(self.progress.step - 1, share, self.config.schedule)
        self.write({"loss": loss, "lr_factor": factor, "tokens_per_second": round(speed), "seq_len": stage.seq_len})
        say(
            f"step {self.progress.step}  {100 * share:.1f} %  loss {loss:.4f}  lr x{factor:.3f}  "
            f"{tokens / 1e6:.2f}M tokens  {speed:,.0f} tokens/s"
        )

    @torch.no_grad()
    def evaluate(self, share: float) -> None:
        """Measure the loss on the validation slice, in windows of the stage in force."""
        began = time.monotonic()
        seq_len = stage_at(share, self.config.stages).seq_len
        count = min(self.config.eval_tokens, len(self.validation) - 1) // seq_len
        if count < 1:
            raise InputError(f"the validation slice is shorter than one window of {seq_len} tokens")
        inputs = self.validation[: count * seq_len].view(count, seq_len)
        targets = self.validation[1 : count * seq_len + 1].view(count, seq_len)
        rows = max(1, 8192 // seq_len)
        self.model.eval()
        losses = [self.eager_loss(x, y) * len(x) for x, y in zip(inputs.split(rows), targets.split(rows), strict=True)]
        self.model.train()
        loss = torch.stack(losses).sum().item() / count
        bits = loss / (math.log(2) * self.validation_bytes_per_token)
        self.write({"validation_loss": loss, "validation_bits_per_byte": bits, "seq_len": seq_len})
        say(f"step {self.progress.step}  validation loss {loss:.4f}, about {bits:.4f} bits per byte")
        draw_curve(self.out / "log.jsonl", self.out / "curve.png")
        self._logged = (self._logged[0], self._logged[1] + time.monotonic() - began)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line to the log."""
        progress = self.progress
        line = {
            "step": progress.step,
            "tokens": progress.tokens_seen,
            "seconds": round(progress.elapsed, 1),
            **entry,
        }
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write a checkpoint."""
        folder = save_checkpoint(self.out, self.model, self.optimizers, self.progress, self.facts)
        say(f"saved {folder}")


def read_pack_facts(data: Path) -> dict[str, Any]:
    """Return `pack.json` of a folder of packed tokens."""
    try:
        return json.loads((data / "pack.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{data} holds no packed tokens (run training.pack first): {error}") from error


def truncate_log(log: Path, step: int) -> None:
    """Drop log lines beyond the step a run resumes from."""
    if log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


def build_trainer(
    config: TrainConfig,
    data: Path,
    out: Path,
    device: torch.device,
    time_limit: float = 0.0,
    resume: bool = False,
) -> Trainer:
    """Set up a run in `out`, from its newest checkpoint when `resume` is set.

    Raises:
        InputError: the data or the output folder cannot be used for this run.
    """
    if not config.steps and not time_limit:
        raise InputError("give a time limit, or `steps` in the configuration")
    packed = read_pack_facts(data)
    found = list_checkpoints(out)
    if found and not resume:
        raise InputError(f"{out} holds checkpoints; add --resume or choose another folder")
    torch.manual_seed(config.seed)
    model = build_model(config.architecture, config.model, packed["vocab_size"], packed["eos_token_id"])
    longest = max(stage.seq_len for stage in config.stages)
    if longest > max_positions(model):
        raise InputError(f"a stage has windows of {longest} tokens, the model takes {max_positions(model)}")
    scale_residual_outputs(model)
    model.to(device)
    optimizers = build_optimizers(model, config.optim)
    progress = load_checkpoint(found[-1], model, optimizers) if found else Progress()
    out.mkdir(parents=True, exist_ok=True)
    truncate_log(out / "log.jsonl", progress.step)
    held_out = packed["validation"]
    return Trainer(
        config=config,
        model=model,
        optimizers=optimizers,
        sampler=WindowSampler(load_tokens(data / "train.npy"), longest, config.seed, device),
        validation=torch.from_numpy(load_tokens(data / "validation.npy").astype(np.int64)).to(device),
        validation_bytes_per_token=held_out["bytes"] / held_out["tokens"],
        out=out,
        device=device,
        facts={
            "config": config.as_dict(),
            "vocab_size": packed["vocab_size"],
            "eos_token_id": packed["eos_token_id"],
        },
        time_limit=time_limit,
        progress=progress,
    )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="TOML file, as in training/configs")
    parser.add_argument("--data", type=Path, required=True, help="folder written by training.pack")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and curve")
    parser.add_argument("--time-limit", type=float, default=0.0, help="seconds over all sittings, decay included")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--stop-at", type=int, default=0, help="stop at this step, keeping a checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="override the configuration")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    overrides = {} if args.compile is None else {"compile": args.compile}
    config = load_config(args.config, device.type, overrides)
    trainer = build_trainer(config, args.data, args.out, device, args.time_limit, args.resume)
    say(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters on {device}")

    def stop(signum: int, frame: object) -> None:
        say("stopping after this step")
        trainer.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    trainer.run(args.stop_at)


if __name__ == "__main__":
    run_main(main)
