"""Every numerical tolerance of the tests, by dtype; loosening one is a commit of its own."""

import torch

LOGITS = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 0.15}
"""Largest absolute difference of logits between two ways of computing the same thing."""

LOSS = 1e-5
"""Largest absolute difference of a mean loss, in nats."""

KERNEL_LOGITS = 0.02
"""Largest absolute difference of logits between the compiled kernels and their definition, on tiny random models.

One product is off by about 4e-5 of its outputs; layers of random weights amplify that.
"""

KERNEL_LOSS = 0.02
"""Largest absolute difference of a mean loss between the two on a tiny random model, in nats."""
