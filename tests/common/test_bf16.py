"""bf16 in and out of float32 through the operations: all 65,536 values, and every midpoint."""

from fractions import Fraction

import numpy as np

from engine.ops import Ops
from tests.twin.bits import assert_same_bits

ONE, MINUS_ZERO = 0x3F80, 0x8000


def every_value() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def finite_values() -> np.ndarray:
    values = every_value()
    return values[(values & 0x7F80) != 0x7F80]


def test_every_finite_value_and_infinity_survives_a_sum_with_minus_zero(twin: Ops):
    values = every_value()
    is_nan = (values & 0x7FFF) > 0x7F80

    result = twin.residual_add(values, np.full_like(values, MINUS_ZERO))

    assert_same_bits(result[~is_nan], values[~is_nan])


def test_every_nan_becomes_the_one_that_the_gpu_writes(twin: Ops):
    values = every_value()
    nans = values[(values & 0x7FFF) > 0x7F80]

    result = twin.residual_add(nans, np.full_like(nans, MINUS_ZERO))

    assert (result == 0x7FFF).all()


def test_every_value_is_widened_exactly(twin: Ops):
    # x * 1 as float32 shows the conversion without a rounding
    values = finite_values()
    x = np.zeros((len(values), 16), np.uint16)
    x[:, 3] = values
    w = np.zeros((1, 16), np.uint16)
    w[0, 3] = ONE

    result = twin.linear_f32(x, w)[:, 0]

    nonzero = (values & 0x7FFF) != 0
    assert (result.view(np.uint32)[nonzero] == values[nonzero].astype(np.uint32) << 16).all()
    assert (result.view(np.uint32)[~nonzero] == 0).all()


def test_every_midpoint_goes_to_the_even_neighbour(twin: Ops):
    # v + half a last place of v, both bf16: normal values whose half place is representable
    values = finite_values()
    exponent = (values >> 7) & 0xFF
    values, exponent = values[exponent > 8], exponent[exponent > 8]
    half = (values & 0x8000) | ((exponent - 8) << 7).astype(np.uint16)

    result = twin.residual_add(values, half)

    assert (result == values + (values & 1)).all()


def test_a_hair_beside_every_midpoint_goes_to_the_nearer_neighbour(twin: Ops):
    values = finite_values()
    exponent = (values >> 7) & 0xFF
    values, exponent = values[exponent > 9], exponent[exponent > 9]
    sign = values & 0x8000
    over = sign | ((exponent - 8) << 7).astype(np.uint16) | 1  # half a place and a 256th
    under = sign | ((exponent - 9) << 7).astype(np.uint16) | 0x7F  # half a place less a 256th

    assert (twin.residual_add(values, over) == values + 1).all()
    assert (twin.residual_add(values, under) == values).all()


def test_sums_of_denormals_are_exact(twin: Ops):
    small = np.arange(1 << 8, dtype=np.uint16)
    x, y = (v.ravel() for v in np.meshgrid(small[:128], small[:128]))
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)

    assert_same_bits(twin.residual_add(x, y), x + y)


def test_random_sums_are_the_nearest_value_to_the_exact_sum(twin: Ops):
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0x3000, 0x4FFF, 2000).astype(np.uint16) for _ in range(2))
    y ^= (rng.integers(0, 2, 2000) << 15).astype(np.uint16)

    def exact(bits: int) -> Fraction:
        return Fraction(float(np.uint32(int(bits) << 16).view(np.float32)))

    for left, right, result in zip(x, y, twin.residual_add(x, y), strict=True):
        error = abs(exact(result) - exact(left) - exact(right))
        for neighbour in (result - 1, result + 1):
            if (neighbour & 0x7FFF) < 0x7F80:
                assert error <= abs(exact(neighbour) - exact(left) - exact(right))
