"""Phi-3: Llama with fused projections, and a window in every layer where one is given."""

from quicksilver.families.llama_like import LlamaLike, declare

FAMILY = declare(
    LlamaLike(
        "Phi3",
        fused=True,
        activation="activation_fn",
        idle=("resid_attn_dropout", "resid_mlp_dropout"),
        windows="every layer",
    )
)
