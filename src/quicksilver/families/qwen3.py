"""Qwen3: Llama with normed queries and keys, and windows as in Qwen2."""

from quicksilver.families.llama_like import LlamaLike, declare

FAMILY = declare(LlamaLike("Qwen3", windows="by kind"))
