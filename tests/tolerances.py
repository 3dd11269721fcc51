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

KERNEL_LOGITS = 0.12
"""Largest absolute difference of logits between the compiled kernels and their definition, on tiny random models.

Both round activations to 8 bits. Where float32's rounding on the way there differs, an activation in the middle between
two codes may become the other one: a step of 0.8 % of its group's largest. Layers of random weights amplify that.
"""

UNTIED_LOGITS = 0.05
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

ATTENDED = 1e-5
"""Largest absolute difference of what the kernels attend to, in float32, from the same in float64.

Values are normal; scores, which come to be exponents, go up to about 10 and have float32's units of their size.
"""

LAYER_NORM = {"atol": 3e-5, "rtol": 1e-5}
"""The same after LayerNorm, for `torch.testing.assert_close`.

A row of few numbers may lie close together around its mean: what is left of them is divided by their spread, and the
rounding of the mean with it.
"""

PRODUCT = 1e-6
"""Largest error of a kernel's product with activations rounded to 8 bits, of the sum of its parts' magnitudes.

Sums of groups are exact; what is left are float32's roundings, of 6e-8, of some scales and sums one after another.
"""

PRODUCT_RMS = 6e-3
"""Largest error of a kernel's product with activations as they are, root mean square, as a share of the outputs'.

Rounding normal numbers to multiples of a 127th of the largest of 16 costs about 4e-3 of their size.
"""

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
