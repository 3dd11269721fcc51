"""SmolLM3: Llama of whose layers some rotate nothing; those may have windows."""

from operator import attrgetter

from quicksilver.families.llama_like import LlamaLike, declare

FAMILY = declare(LlamaLike("SmolLM3", windows="by kind", rotates=attrgetter("no_rope_layers")))
