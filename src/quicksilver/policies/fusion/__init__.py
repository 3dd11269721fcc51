"""Fusion: how pairs that are alike become groups; which are alike, the rules say themselves."""

from quicksilver.policies.fusion.chain import chain

__all__ = ["chain"]
