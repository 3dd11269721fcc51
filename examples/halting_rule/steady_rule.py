"""A halting rule for QuickSilver's plans: {"type": "steady", "threshold": 0.99}."""

from __future__ import annotations

from dataclasses import dataclass

from quicksilver import rules


@rules.halting_rule("steady")
@dataclass(frozen=True)
class SteadyRule(rules.ThresholdRule):
    """Halts a token where a layer keeps its state's direction: `cos(h[l], h[l-1])` above the threshold."""

    def decide(self, view: rules.LayerView) -> rules.HaltDecision:
        """Return which of the N tokens in view halt after the layer, and how many rows each signal was computed for."""
        import torch  # not at the top: `quicksilver plan` reads the rule and needs no PyTorch

        cosine = torch.cosine_similarity(view.before.float(), view.after.float(), dim=-1)  # [N]
        halt = cosine > rules.threshold_at(self.threshold, view.layer_idx)
        return rules.HaltDecision(halt, {"cosine": view.num_rows})
