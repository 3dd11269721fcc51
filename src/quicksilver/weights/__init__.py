"""Quantized weights: their form, how they are made of floats, and how those of other programs are taken over."""
