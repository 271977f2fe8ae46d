"""bfloat16 and float32 as grids: spacing, rounding, and the distance of two values in ULPs.

Knows number formats only. Invariant: distances are of ordinals, so +0 and -0 are 0 apart, the
largest finite value and infinity are 1 apart, and a NaN is NAN_DISTANCE from everything but itself.
"""

import torch
from torch import Tensor

U = 2.0**-8  # bfloat16: largest relative rounding error
U32 = 2.0**-24  # float32: the same
NAN_DISTANCE = 2**31 - 1  # ULPs; larger than any distance of two numbers
MIN_NORMAL = 2.0**-126  # of bfloat16 and float32 alike
HISTOGRAM_BINS = 5  # 0, 1, 2, 3-4 and more ULPs

_EXPONENT_BITS = 0x7F800000


def to_bf16(x: Tensor) -> Tensor:
    """The nearest bfloat16 of each value, by way of float32 as every implementation goes."""
    return x.to(torch.float32).to(torch.bfloat16)


def power_below(x: Tensor) -> Tensor:
    """The largest power of two not above |x|, at least the smallest normal number; float32."""
    bits = x.view(torch.int32) & _EXPONENT_BITS
    return bits.view(torch.float32).clamp_min_(MIN_NORMAL)


def half_spacing(x: Tensor) -> Tensor:
    """h(x): half the bfloat16 spacing at x, widened by 2^-7 for an x near a power of two.

    Args:
        x: float32, any shape.
    """
    return power_below(x).mul_(U * (1 + 2.0**-7))


def ordinal(x: Tensor) -> Tensor:
    """The place of each value in the ordered line of its format, int64: neighbours differ by one.

    Args:
        x: bfloat16 or float32.
    """
    if x.dtype == torch.bfloat16:
        bits = x.contiguous().view(torch.int16).to(torch.int64)
        magnitude = bits & 0x7FFF
    else:
        bits = x.contiguous().view(torch.int32).to(torch.int64)
        magnitude = bits & 0x7FFFFFFF
    return torch.where(bits < 0, -magnitude, magnitude)


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """ULPs between values of one format, int64; NAN_DISTANCE where just one of the two is NaN."""
    distance = (ordinal(a) - ordinal(b)).abs()
    a_nan, b_nan = a.isnan(), b.isnan()
    distance = torch.where(a_nan ^ b_nan, NAN_DISTANCE, distance)
    return torch.where(a_nan & b_nan, 0, distance)


def neighbour(x: Tensor, steps: int) -> Tensor:
    """The bfloat16 value `steps` places further along the line; stops at the infinities."""
    place = (ordinal(x) + steps).clamp(-0x7F80, 0x7F80)
    bits = torch.where(place < 0, (-place) | 0x8000, place)
    return bits.to(torch.uint16).view(torch.bfloat16)


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one 2- or 4-byte format hold the same bits; true for equal NaNs."""
    kind = torch.int16 if a.element_size() == 2 else torch.int32
    return a.contiguous().view(kind) == b.contiguous().view(kind)


def histogram(distances: Tensor, num_values: int) -> list[int]:
    """Counts of 0, 1, 2, 3-4 and more ULPs.

    Args:
        distances: ULPs of the values that differ at all, flat.
        num_values: values compared, the equal ones included.
    """
    edges = torch.tensor([1, 2, 4])
    bins = torch.bucketize(distances[distances > 0], edges)
    counts = torch.bincount(bins, minlength=4).tolist()
    return [num_values - sum(counts), *counts]
