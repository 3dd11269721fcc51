"""Gemma 3, text alone: as Gemma 2 with normed queries and keys, unbounded scores, and rotary frequencies by kind."""

from operator import attrgetter

from quicksilver.families.llama_like import LlamaLike, declare

FAMILY = declare(
    LlamaLike(
        "Gemma3",
        body="Gemma3TextModel",
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
        windows="by kind",
        logits_softcap=attrgetter("final_logit_softcapping"),
        refused=("use_bidirectional_attention",),
    )
)
