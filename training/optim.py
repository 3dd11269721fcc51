"""Optimisers: Muon for the hidden matrices, AdamW for embeddings, norms and biases.

Muon is written out here, batched over equal shapes, because `torch.optim.Muon` takes one matrix at a time and
cannot split GPT-2's fused query-key-value matrix. Learning-rate schedules live in `schedule.py`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from training.config import OptimConfig

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan et al. 2024, "Muon"


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Map each matrix of `[N, rows, cols]` near its closest semi-orthogonal one (Newton-Schulz, bfloat16)."""
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT  # [N, rows, rows]
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each hidden matrix moves by `lr` in every direction alike.

    Args:
        matrices: (parameter, whether its shape is [in, out], how many output blocks it fuses) triples.
        lr: step size; multiplied by sqrt(out / in) where that exceeds one.
        momentum: Nesterov momentum.
        weight_decay: decoupled, multiplied by `lr`.
    """

    def __init__(
        self, matrices: list[tuple[nn.Parameter, bool, int]], lr: float, momentum: float, weight_decay: float
    ) -> None:
        self._layout = {id(param): (is_in_out, blocks) for param, is_in_out, blocks in matrices}
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([param for param, _, _ in matrices], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is None:
                    continue
                for target, update in self._blocks(param, self._momentum(param, group["momentum"])):
                    by_shape[target.shape].append((target, update))
                param.mul_(1.0 - group["lr"] * group["weight_decay"])
            for shape, pairs in by_shape.items():
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                moves = orthogonalize(torch.stack([update for _, update in pairs])).float()
                torch._foreach_add_([target for target, _ in pairs], list(moves.unbind()), alpha=-scale)

    def _momentum(self, param: nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer = state["momentum_buffer"].lerp_(param.grad, 1.0 - momentum)
        return param.grad.lerp(buffer, momentum)

    def _blocks(self, param: nn.Parameter, update: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pair views of the parameter with parts of its update, each `[out, in]`."""
        is_in_out, blocks = self._layout[id(param)]
        target = param.mT if is_in_out else param
        update = update.mT if is_in_out else update
        return list(zip(target.chunk(blocks, 0), update.chunk(blocks, 0), strict=True))


def hidden_matrices(model: nn.Module) -> list[tuple[nn.Parameter, bool, int]]:
    """List the linear maps inside the layers: (weight, stored as [in, out], fused output blocks)."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in tied:
            found.append((module.weight, isinstance(module, Conv1D), 3 if name.endswith("c_attn") else 1))
    return found


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return the optimisers that together cover every parameter once; each group keeps its `base_lr`."""
    hidden = hidden_matrices(model)
    hidden_ids = {id(param) for param, _, _ in hidden}
    rest = [param for param in model.parameters() if id(param) not in hidden_ids]
    groups: list[dict[str, Any]] = [
        {"params": [param for param in rest if param.dim() > 1], "weight_decay": config.adam_weight_decay},
        {"params": [param for param in rest if param.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if config.hidden == "muon":
        optimizers.append(Muon(hidden, config.muon_lr, config.muon_momentum, config.muon_weight_decay))
    else:
        groups[0]["params"] += [param for param, _, _ in hidden]
    groups = [group for group in groups if group["params"]]
    optimizers.append(torch.optim.AdamW(groups, lr=config.adam_lr, betas=config.adam_betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its base rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
