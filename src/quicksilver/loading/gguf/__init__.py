"""GGUF files as models of transformers: configuration, names of weights, tokenizer, stop tokens."""
