"""Mistral: Llama with a window in every layer where one is given."""

from quicksilver.families.llama_like import LlamaLike, declare

FAMILY = declare(LlamaLike("Mistral", windows="every layer"))
