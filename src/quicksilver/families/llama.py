"""Llama."""

from quicksilver.families.llama_like import LlamaLike, declare

FAMILY = declare(LlamaLike("Llama"))
