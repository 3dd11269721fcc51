"""Typed tensor operations with named backends; an explicit choice that is not there fails."""

from quicksilver.ops.attention import AttentionBackend, ragged_attention

__all__ = ["AttentionBackend", "ragged_attention"]
