"""OLMo 2: Llama with norms behind sublayers instead of before them, and norms of whole queries and keys."""

from quicksilver.families.llama_like import LlamaLike, declare

FAMILY = declare(
    LlamaLike(
        "Olmo2",
        norms=(None, None),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        norms_projections=True,
    )
)
