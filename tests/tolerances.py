"""Every numerical tolerance of the tests, by dtype; loosening one is a commit of its own."""

import torch

LOGITS = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 0.15, torch.float16: 0.02}
"""Largest absolute difference of logits between two ways of computing the same thing; of the largest in 16 bits."""

LOSS = 1e-5
"""Largest absolute difference of a mean loss, in nats."""

LOGLIKELIHOOD = 1e-3
"""Largest absolute difference of a request's loglikelihood between two ways of computing it, in nats."""

LOSS_SHARE = 1e-5
"""Largest relative difference of a mean loss from the same one computed by hand, in float32."""

KERNEL_LOGITS = 0.02
"""Largest absolute difference of logits between the compiled kernels and their definition, on tiny random models.

One product is off by about 4e-5 of its outputs; layers of random weights amplify that.
"""

UNTIED_LOGITS = 5e-3
"""The same for 26 tokens of two such models under plans none of whose decisions is near its threshold."""

KERNEL_LOSS = 0.02
"""Largest absolute difference of a mean loss between the two on a tiny random model, in nats."""

KERNEL_COST = 1e-3
"""Largest relative difference of what runs cost between the two, over several texts.

Where a value lies on a threshold the two may decide otherwise, and few do.
"""

KERNEL_COST_OF_A_TEXT = 5e-3
"""The same for one text of 60 tokens, of which one decision is a larger part."""

SUMS = 2e-6
"""Largest difference, absolute and relative, between the kernels' float32 sums of normal numbers and float64's.

Sums of up to 768 terms, in 16 parts or more, lose a few of float32's units of 6e-8.
"""

LAYER_NORM = {"atol": 3e-5, "rtol": 1e-5}
"""The same after LayerNorm, for `torch.testing.assert_close`.

A row of few numbers may lie close together around its mean: what is left of them is divided by their spread, and the
rounding of the mean with it.
"""

PRODUCT_RMS = 8e-5
"""Largest error of a kernel's product, root mean square, as a share of the outputs'.

In practice it is about 4e-5: integers of 16 bits for activations and for the ratios of scales.
"""

PRODUCT_MAX = 1e-4
"""Largest error of any output of such a product as a share of the largest output, whatever the activations' size."""

MLP_RMS = 5e-4
"""The same as `PRODUCT_RMS` for two products with an activation between them, and one more where it is gated."""

DECODED_LOSS = 1e-4
"""Largest absolute difference of a mean loss, or of a divergence, between windows and token by token, in nats.

Logits of the two may be as far apart as `LOGITS` says of float32.
"""

DIVERGENCE = 1e-4
"""Largest difference, absolute and relative, of a divergence in nats: a sum over log-probabilities in float32."""

PERPLEXITY = 2e-4
"""Largest absolute difference of a perplexity near 1.5 from a published one of four digits."""

RIDGE = 2e-4
"""Largest absolute difference of weights fitted from sums of float32 products and those of a direct solution.

Without the penalty weights differ a hundred times as much.
"""

RIDGE_CONSTANT = 2e-5
"""Largest relative difference of a constant fitted in float32 where inputs explain nothing of it."""

MAPPED = 1e-4
"""Largest difference, absolute and relative, of a fitted map applied in float32 from the same in float64."""

HESSIAN = {"rtol": 1e-4, "atol": 1e-3}
"""The same for sums of squares over batches and over all rows at once, for `torch.testing.assert_close`."""

RESIDUAL = 1e-4
"""Largest product of what a least-squares factor leaves and what it scales, 70 float32 terms; exactly 0."""

ORTHOGONAL_BFLOAT16 = 2e-2
"""Largest absolute difference of an update made orthogonal, of numbers below 1 in bfloat16, in steps of up to 4e-3."""
