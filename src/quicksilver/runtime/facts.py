"""What transformers' tools ask of a model besides running it; answered by the wrapped model."""

from typing import Any

from torch import nn

from quicksilver.families.spec import num_quantized


class ModelFacts(nn.Module):
    """Facts of the wrapped transformers model, under the names that transformers has for them."""

    model: Any
    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    hf_quantizer = None
    _is_stateful = False
    _supports_cache_class = True

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    @property
    def name_or_path(self) -> str:
        """Where the wrapped model came from; empty where it was made from a configuration."""
        return self.model.name_or_path

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters, quantized ones among them as transformers' own count leaves them out."""
        plain = self.model.num_parameters(only_trainable, exclude_embeddings)
        return plain + (0 if only_trainable else num_quantized(self.model, exclude_embeddings))

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        return self.model.get_memory_footprint(return_buffers)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie the wrapped model's weights as its configuration says; they are from the beginning."""
        self.model.tie_weights(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()
