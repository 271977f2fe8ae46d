"""How far from float64 a result may lie, element by element, by the declared arithmetic.

Holds the formulas and their one free constant; knows nothing of engines or taps. A budget is the
sum of the roundings that docs/numerics.md declares for a value and of LAMBDA standard deviations of
the rounding noise of its float32 sums, scaled by the conditioning of the very element: under
cancellation it grows as the error does. It holds for any order of summation, so a correct engine
stays at R = |error| / budget <= 1.
"""

import math

from torch import Tensor

from verification.rounding import U32, U, half_spacing
from verification.truth import AttentionExpected, LinearExpected

# Standard deviations: independent mean-zero roundings exceed 6 of them with probability 2 exp(-18)
# = 3e-8.
LAMBDA = 6.0


def linear(expected: LinearExpected) -> Tensor:
    """Tau = h(y) + lambda sqrt(K) u32 (|W| |x|), float32.

    The tensor core cuts instead of rounding; that adds at most (K/16) 2^-23 0.03 (|W| |x|), which
    the lambda term covers for every K of this project.
    """
    return linear_f32(expected).add_(half_spacing(expected.value.float()))


def linear_f32(expected: LinearExpected) -> Tensor:
    """The same for a result left in float32 (logits): no output rounding, so no h(y)."""
    return expected.condition * (LAMBDA * math.sqrt(expected.in_features) * U32)


def attention(expected: AttentionExpected) -> Tensor:
    """Tau of causal attention with float32 scores and a bfloat16 P, float32.

    tau = h(y) + (2 ds + 2 lambda u32 sqrt(tiles)) sum P|v| + lambda (u / sqrt 3) sqrt(sum P^2 v^2),
    where ds = lambda sqrt(d) u32 max_j scale |q| . |k_j| bounds a score's error, and with it exp's.
    """
    score_error = expected.score_condition * (LAMBDA * math.sqrt(expected.head_dim) * U32)
    sums = score_error.mul_(2).add_(expected.num_tiles.sqrt() * (2 * LAMBDA * U32))
    sums.mul_(expected.mean_magnitude)
    rounded_p = expected.spread * (LAMBDA * U / math.sqrt(3.0))
    return sums.add_(rounded_p).add_(half_spacing(expected.value.float()))
