"""Tiny random models of every supported family and variant, made from a seed; no weights are shipped."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from typing import Any, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from quicksilver.families.quantize import quantize_model
from quicksilver.plan.tensors import PlanTensors
from quicksilver.rules import Part
from quicksilver.weights.config import LAYERS_ONLY

MAX_POSITIONS = 64
NUM_LAYERS = 4
HIDDEN_SIZE = 32
VOCAB = 300
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": MAX_POSITIONS,
    **_SPECIAL,
}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = 8
_GEMMA = {**_LLAMA, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 4, "vocab_size": VOCAB, "n_positions": MAX_POSITIONS, **_SPECIAL}


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **values}}


# A new family needs its entry here and in no other file of tests: what is special about it is read from these
# configurations and from transformers' modules.
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(**_GPT2),
    "llama": lambda: LlamaConfig(**_LLAMA),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=12),
    "gemma2": lambda: Gemma2Config(**_GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=6.0),
    "gemma3_text": lambda: Gemma3TextConfig(**{**_GEMMA, "layer_types": [SLIDING, SLIDING, FULL, SLIDING]}),
    "phi3": lambda: Phi3Config(**_LLAMA, sliding_window=None),
    "olmo2": lambda: Olmo2Config(**_LLAMA),
    "granite": lambda: GraniteConfig(
        **_LLAMA, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.0
    ),
    "smollm3": lambda: SmolLM3Config(**_LLAMA),
}
FAMILIES = tuple(CONFIGS)

VARIANTS: dict[str, Any] = {
    "gpt2-inverse-layer-scale": lambda: GPT2Config(**_GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt2-unscaled-relu-untied": lambda: GPT2Config(
        **_GPT2, scale_attn_weights=False, activation_function="relu", n_inner=40, tie_word_embeddings=False
    ),
    "llama-tied-biased": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-mha": lambda: LlamaConfig(**{**_LLAMA, "num_key_value_heads": 4}),
    "llama-one-kv-head": lambda: LlamaConfig(**{**_LLAMA, "num_key_value_heads": 1}),
    "llama-rope-linear": lambda: LlamaConfig(**_LLAMA, **_rope("linear", factor=2.0)),
    "llama-rope-dynamic": lambda: LlamaConfig(**_LLAMA, **_rope("dynamic", factor=2.0)),
    "llama-rope-yarn": lambda: LlamaConfig(
        **_LLAMA, **_rope("yarn", factor=2.0, original_max_position_embeddings=MAX_POSITIONS // 2)
    ),
    "llama-rope-llama3": lambda: LlamaConfig(
        **_LLAMA,
        **_rope(
            "llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=MAX_POSITIONS // 4,
        ),
    ),
    "llama-rope-longrope": lambda: LlamaConfig(
        **{**_LLAMA, "max_position_embeddings": 2 * MAX_POSITIONS},
        **_rope(
            "longrope",
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[2.0, 2.1, 2.2, 2.3],
            factor=2.0,
            original_max_position_embeddings=MAX_POSITIONS,
        ),
    ),
    "mistral-wide-window": lambda: MistralConfig(**_LLAMA, sliding_window=MAX_POSITIONS),
    "mistral-window": lambda: MistralConfig(**_LLAMA, sliding_window=WINDOW),
    "phi3-window": lambda: Phi3Config(**_LLAMA, sliding_window=WINDOW),
    "phi3-longrope": lambda: Phi3Config(
        **{**_LLAMA, "max_position_embeddings": 2 * MAX_POSITIONS},
        original_max_position_embeddings=MAX_POSITIONS,
        **_rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 2.1, 2.2, 2.3]),
    ),
    "qwen2-windows": lambda: Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3-windows": lambda: Qwen3Config(
        **_LLAMA, head_dim=12, use_sliding_window=True, sliding_window=WINDOW, layer_types=[SLIDING, FULL] * 2
    ),
    "smollm3-windows": lambda: SmolLM3Config(
        **_LLAMA, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=WINDOW
    ),
    "gemma2-unbounded": lambda: Gemma2Config(**_GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3_text-bounded-untied": lambda: Gemma3TextConfig(
        **{**_GEMMA, "tie_word_embeddings": False, "sliding_window": 1}, final_logit_softcapping=6.0
    ),
    "olmo2-biased": lambda: Olmo2Config(**_LLAMA, attention_bias=True),
    "granite-biased": lambda: GraniteConfig(**_LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen2-tied": lambda: Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    "qwen3-biased": lambda: Qwen3Config(**_LLAMA, head_dim=8, attention_bias=True),
}


def config_of(name: str) -> Any:
    """Return the configuration of a family or variant."""
    return (CONFIGS.get(name) or VARIANTS[name])()


WINDOWED = tuple(name for name in (*FAMILIES, *VARIANTS) if getattr(config_of(name), "sliding_window", None))
"""Families and variants with sliding windows."""

ROTATED = tuple(name for name in (*FAMILIES, *VARIANTS) if hasattr(config_of(name), "rope_parameters"))
"""Families and variants with rotary positions."""

MORE = ("llama-one-kv-head", "gpt2-unscaled-relu-untied", "mistral-window", "smollm3-windows")
"""Variants on which mechanisms are tested besides families."""

LAYOUTS = ("gpt2", "llama")
"""One family of each module that describes families: learned positions and one map for queries, keys and values; rotary
positions and shared key heads. What is the same for all families, and costs more than a moment, is tested on these."""

TELLING = (*LAYOUTS, "gemma3_text")
"""With windows, two rotations and norms around sublayers besides: where what a layer reads or caches takes part."""


def on_telling(
    cases: Collection[Any], everywhere: Collection[Any], models: Iterable[str] = FAMILIES
) -> list[tuple[str, Any]]:
    """Return pairs of a model and a case: telling families with every case, other models with those of `everywhere`.

    Args:
        cases: what is tested, names of plans for example.
        everywhere: those among them in which the models' own code takes part.
        models: families and variants.
    """
    return [(name, case) for name in models for case in (cases if name in TELLING else everywhere)]


def from_config(config: Any, seed: int = 0) -> Any:
    """Return a random float32 model in evaluation mode, with weights large enough for tokens to differ."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:  # about what it begins with: 1, or 0 where a norm adds 1 to it
                centre = float(parameter.mean())
                parameter.uniform_(centre - 0.3, centre + 0.3)
    return made


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return the tiny model of a family or variant; shared, so tests must not change it."""
    return from_config(config_of(name)).to(dtype)


@cache
def quantized(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return the tiny model of a family or variant with any-precision weights; shared, so tests must not change it."""
    made = from_config(config_of(name)).to(dtype)
    quantize_model(made, LAYERS_ONLY)
    return made


@cache
def fitted(
    seed: int = 0, rank: int | None = None, outputs: tuple[int, ...] = (0, 1, 2), gates: tuple[int, ...] = (0, 1, 2)
) -> PlanTensors:
    """Return random output maps, of full rank or of a lower one, and random gates for the given layers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {}
    for layer_idx in range(NUM_LAYERS):
        weight, bias, gate = draw(HIDDEN_SIZE, HIDDEN_SIZE), draw(HIDDEN_SIZE), draw(HIDDEN_SIZE + 4)
        if layer_idx in outputs:
            name = f"output.{layer_idx}"
            factors = {"weight": 0.1 * weight}
            if rank is not None:
                factors = {"down": 0.2 * weight[:, :rank], "up": 0.2 * weight[-rank:]}
            tensors |= {f"{name}.{key}": value for key, value in factors.items()} | {f"{name}.bias": 0.3 * bias}
        if layer_idx in gates:
            tensors[f"gate.{layer_idx}.weight"] = 0.2 * gate
    return PlanTensors(tensors)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose ids fit the tiny models; 0 is BOS, EOS and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, **{symbol: i + 1 for i, symbol in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


@cache
def shortcut_tensors(seed: int = 0, rank: int | None = None) -> PlanTensors:
    """Return random maps and gates past every sublayer of the tiny models, of a rank where one is given.

    A gate's prediction is about 1, give or take a factor of e, so that a threshold near 1 lets some tokens past.
    """
    generator, d, tensors = torch.Generator().manual_seed(seed), _LLAMA["hidden_size"], {}
    for layer_idx in range(_LLAMA["num_hidden_layers"]):
        for part in get_args(Part):
            name = f"shortcut.{layer_idx}.{part}"
            shapes = {"weight": (d, d)} if rank is None else {"down": (d, rank), "up": (rank, d)}
            for key, shape in shapes.items():
                tensors[f"{name}.{key}"] = torch.randn(shape, generator=generator) * shape[0] ** -0.5
            tensors[f"{name}.bias"] = torch.randn(d, generator=generator) * 0.1
            of_input = torch.randn(d, generator=generator) * d**-0.5
            tensors[f"{name}.gate"] = torch.cat((of_input, torch.tensor([0.5, -1.5])))
    return PlanTensors(tensors)


def token_ids(count: int, seed: int = 0) -> torch.Tensor:
    """Return [count] random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (count,), generator=generator)
