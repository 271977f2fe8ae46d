"""exp2: the page's bits, exact integers, and the error against the true value."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits

NUMERICS_H = Path(__file__).resolve().parents[2] / "csrc" / "common" / "numerics.h"


def floats(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def dense_grid() -> np.ndarray:
    """A million values: every binade around zero, the whole range, and the ends."""
    rng = np.random.default_rng(0)
    ends = np.concatenate([np.nextafter(floats([128, -126]), floats([0, 0])), floats([-126, 0])])
    # where an exhaustive search of 2^-8 <= abs(x) < 1 found the largest errors
    worst = floats([float.fromhex("-0x1.ff2c82p-2"), float.fromhex("0x1.01212ep-1")])
    return np.concatenate(
        [
            floats(np.linspace(-126, 127.99, 600_001)),
            floats(rng.uniform(-1, 1, 300_000)),
            floats(np.ldexp(rng.uniform(-1, 1, 100_000), rng.integers(-149, 8, 100_000))),
            ends,
            worst,
        ]
    )


def test_the_contracts_bits_over_a_dense_grid(twin: Ops):
    x = dense_grid()

    assert_same_bits(twin.exp2(x), contract.exp2(x))


def test_integers_are_exact(twin: Ops):
    n = np.arange(-126, 128)

    assert_same_bits(twin.exp2(floats(n)), floats(np.ldexp(1.0, n)))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (128.0, math.inf),
        (math.inf, math.inf),
        (1e30, math.inf),
        (-126.0, 2.0**-126),
        (np.nextafter(np.float32(-126), np.float32(-200)), 0.0),
        (-127.0, 0.0),
        (-math.inf, 0.0),
        (0.0, 1.0),
        (-0.0, 1.0),
        (2.0**-149, 1.0),
        (-(2.0**-149), 1.0),
    ],
)
def test_the_ends_of_the_range(twin: Ops, x: float, expected: float):
    assert_same_bits(twin.exp2(floats([x])), floats([expected]))


def test_a_nan_stays_one(twin: Ops):
    assert np.isnan(twin.exp2(floats([math.nan]))).all()


@pytest.mark.parametrize("half", [-125.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5])
def test_ties_go_to_the_even_integer(twin: Ops, half: float):
    x = floats([half])

    assert_same_bits(twin.exp2(x), contract.exp2(x))


def test_the_relative_error_is_the_one_that_is_stated(twin: Ops):
    # numerics.h states the largest relative error in units of 2^-24; float64's own is 2^-52
    text = NUMERICS_H.read_text(encoding="utf-8")
    stated = re.search(r"relative error of the whole.*?(\d+\.\d+) \* 2\^-24", text, re.S)
    x = dense_grid()
    x = x[(x >= -126) & (x < 128)]

    truth = np.exp2(x.astype(np.float64))
    worst = np.abs(twin.exp2(x) / truth - 1).max() * 2.0**24

    assert stated is not None
    assert worst <= float(stated[1]) + 0.005  # two decimals are stated


def test_it_never_decreases_over_the_softmaxs_range(twin: Ops):
    # a larger score must not get a smaller probability by more than the error of either
    x = floats(np.linspace(-20, 0, 200_001))

    y = twin.exp2(x).astype(np.float64)

    assert (y[1:] >= y[:-1] * (1 - 2 * 1.14 * 2.0**-24)).all()


def test_the_coefficients_of_the_reference_are_those_of_numerics_h():
    text = NUMERICS_H.read_text(encoding="utf-8")
    written = [int(x, 16) for x in re.findall(r"EXP2_C\d = (0x[0-9a-f]+)", text)]

    assert tuple(written) == contract.EXP2_BITS
