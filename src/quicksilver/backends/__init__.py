"""Who runs a model's layers, with which arithmetic: PyTorch layer by layer, or compiled kernels several at once."""
