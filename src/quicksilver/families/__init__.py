"""Adapters: how each model family's weights are read by the runtime. Facts plus differences, no layer loops."""
