"""Qwen2: Llama with biases, and windows in some layers where they are asked for."""

from quicksilver.families.llama_like import LlamaLike, declare

FAMILY = declare(LlamaLike("Qwen2", windows="by kind"))
