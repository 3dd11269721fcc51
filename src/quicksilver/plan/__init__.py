"""The plan: what each mechanism may do, its JSON and its arrays; what is decided of tokens is `rules`' business."""

from quicksilver.plan.plan import PLAN_VERSION, PRESETS, Plan

__all__ = ["PLAN_VERSION", "PRESETS", "Plan"]
