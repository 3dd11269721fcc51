"""Typed tensor operations with named backends; an explicit choice that is not there fails."""

from quicksilver.ops.attention import AttentionBackend, Screen, ragged_attention

__all__ = ["AttentionBackend", "Screen", "ragged_attention"]
