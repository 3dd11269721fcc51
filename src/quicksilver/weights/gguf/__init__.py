"""GGUF files, llama.cpp's: their metadata, and their tensors as floats or as the very codes that they hold."""
