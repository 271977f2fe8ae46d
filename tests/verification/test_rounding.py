import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verification.rounding import (
    NAN_DISTANCE,
    half_spacing,
    histogram,
    neighbour,
    ordinal,
    power_below,
    same_bits,
    to_bf16,
    ulp_distance,
)


def bf16(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


def from_bits(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def test_ordinals_of_all_numbers_ascend_with_them():
    bits = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the bits
        values = bits.view(ml_dtypes.bfloat16).astype(np.float64)
    order = ordinal(torch.from_numpy(bits).view(torch.bfloat16)).numpy()
    finite = np.isfinite(values)
    by_value = np.argsort(values[finite], kind="stable")

    assert (np.diff(order[finite][by_value]) >= 0).all()
    assert len(set(order[finite])) == finite.sum() - 1  # +0 and -0 share one


@pytest.mark.parametrize(
    ("a", "b", "ulps"),
    [
        (1.0, 1.0, 0),
        (1.0, 1.0078125, 1),
        (1.0, 0.99609375, 1),
        (0.0, -0.0, 0),
        (1.0, -1.0, 2 * 0x3F80),
        (3.3895e38, math.inf, 1),
        (math.nan, 1.0, NAN_DISTANCE),
        (math.nan, math.nan, 0),
    ],
)
def test_distances(a, b, ulps):
    assert int(ulp_distance(bf16(a), bf16(b))) == ulps
    assert int(ulp_distance(bf16(b), bf16(a))) == ulps


def test_float32_has_its_own_ulps():
    one = torch.tensor([1.0])

    assert int(ulp_distance(one, torch.nextafter(one, torch.tensor([2.0])))) == 1


@given(st.integers(0, 0xFFFF), st.integers(-5, 5))
def test_a_neighbour_is_that_many_steps_away(bits, steps):
    value = from_bits(bits)
    if not value.isfinite().all():
        return
    moved = neighbour(value, steps)

    assert int(ulp_distance(moved, value)) == abs(steps) or moved.isinf().all()


def test_neighbours_pass_through_zero_and_stop_at_infinity():
    assert float(neighbour(from_bits(0x0001), -1)) == 0.0
    assert float(neighbour(from_bits(0x0000), -1)) == -float(from_bits(0x0001))
    assert float(neighbour(from_bits(0x7F7F), 3)) == math.inf


@given(st.floats(-1e30, 1e30))
def test_half_a_spacing_bounds_the_rounding(value):
    wide = torch.tensor([value], dtype=torch.float64)
    error = (to_bf16(wide).double() - wide).abs()

    assert float(error) <= float(half_spacing(wide.float()))


@pytest.mark.parametrize(("x", "power"), [(1.0, 1.0), (1.99, 1.0), (-3.0, 2.0), (0.0, 2.0**-126)])
def test_the_power_below(x, power):
    assert float(power_below(torch.tensor([x]))) == power


def test_bits_tell_zeros_apart_and_hold_nans_equal():
    assert same_bits(bf16(0.0, math.nan, 1.0), bf16(-0.0, math.nan, 1.0)).tolist() == [
        False,
        True,
        True,
    ]


def test_a_histogram_has_all_values_in_its_five_bins():
    assert histogram(torch.tensor([1, 1, 2, 3, 4, 5, 900, NAN_DISTANCE]), 20) == [12, 2, 1, 2, 3]
    assert histogram(torch.tensor([], dtype=torch.int64), 3) == [3, 0, 0, 0, 0]
