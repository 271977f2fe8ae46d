"""The reference itself against rational arithmetic and against results worked out by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.twin import contract
from tests.twin.bits import assert_same_bits
from tests.twin.step_inputs import ACCUMULATOR, OPERANDS

ONE, MINUS_ONE = 0x3F80, 0xBF80


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def operands(*values: float) -> np.ndarray:
    a = np.zeros((1, 16), np.uint16)
    a[0, : len(values)] = contract.bf(floats(*values))
    return a


@settings(max_examples=150)
@given(ACCUMULATOR, OPERANDS, OPERANDS)
def test_the_step_in_int64_is_the_step_in_rational_numbers(c, a, b):
    c = np.uint32(c).view(np.float32)

    fast = contract.step(np.array([c]), np.array([a], np.uint16), np.array([b], np.uint16))

    assert_same_bits(fast, np.array([contract.step_by_fractions(c, a, b)], np.float32))


@pytest.mark.parametrize(
    ("c", "a", "b", "expected"),
    [
        (0.0, (1, 2, 3), (4, 5, 6), 32.0),
        (-32.0, (1, 2, 3), (4, 5, 6), 0.0),
        (0.0, (math.inf,), (2.0,), math.inf),
        (1.0, (-math.inf, 3.0), (2.0, 2.0**120), -math.inf),
        # e = 0: the unit is 2^-25, so 2^-25 is kept and 1.5 * 2^-26 is cut to nothing
        (2.0**-25, (1.0, -1.0), (1.0, 1.0), 2.0**-25),
        (1.5 * 2.0**-26, (1.0, -1.0), (1.0, 1.0), 0.0),
        (-(2.0**-26), (1.0, -1.0), (1.0, 1.0), 0.0),
        # a cut goes toward zero: 1 + 2^-24 is 1 and so is -(1 + 2^-24) in magnitude
        (2.0**-24, (1.0,), (1.0,), 1.0),
        (-(2.0**-24), (-1.0,), (1.0,), -1.0),
        # the product's exponent is not renormalised: 1.5 * 1.5 = 2.25 counts as exponent 0
        (3 * 2.0**-25, (1.5, -1.5), (1.5, 1.5), 3 * 2.0**-25),
        # a product that is zero has no exponent, however large its other operand
        (2.0**-26, (0.0,), (2.0**127,), 2.0**-26),
        (2.0**-26, (-0.0, 2.0**-30), (2.0**127, 1.0), 2.0**-26 + 2.0**-30),
    ],
)
def test_the_step_gives_what_one_works_out_by_hand(c, a, b, expected):
    result = contract.step(floats(c), operands(*a), operands(*b))

    assert_same_bits(result, floats(expected))


@given(
    *[st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9)] * 3
)
def test_fma_rounds_the_exact_value_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)

    result = contract.fma(floats(a), floats(b), floats(c))[0]

    below, above = (np.nextafter(result, np.float32(s * math.inf)) for s in (-1, 1))
    error = abs(Fraction(float(result)) - exact)
    assert error <= abs(Fraction(float(below)) - exact)
    assert error <= abs(Fraction(float(above)) - exact)


def test_fma_is_not_fooled_by_rounding_twice():
    # 1 + 2^-24 + 2^-60: float64 rounds it to the tie 1 + 2^-24, float32 then to 1
    a, b, c = floats(2.0**-30), floats(2.0**-30), floats(1 + 2.0**-23)

    result = contract.fma(a, b, floats(1.0) + floats(0.0))
    tie = contract.fma(floats(1 + 2.0**-12), floats(1 + 2.0**-12), floats(2.0**-60))

    assert_same_bits(result, floats(1.0))
    assert_same_bits(tie, floats(1 + 2.0**-11 + 2.0**-23))  # the exact value is over the midpoint
    assert c[0] > 1


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (1 + 2.0**-8, 0x3F80),  # a tie, to even
        (1 + 3 * 2.0**-8, 0x3F82),
        (1 + 2.0**-8 + 2.0**-20, 0x3F81),
        (3.4e38, 0x7F80),  # rounds over the largest number
        (-0.0, 0x8000),
        (math.nan, 0x7FFF),
    ],
)
def test_rounding_to_bf16_is_nearest_even(value, bits):
    assert contract.bf(floats(value))[0] == bits
