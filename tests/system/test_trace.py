import numpy as np
import pytest

from tests.system.trace import assert_same_trace


def test_a_flipped_bit_is_named_by_its_tap():
    expected = {"q 0": np.zeros((2, 3), np.uint16), "attn 1": np.zeros((2, 3), np.uint16)}
    actual = {name: values.copy() for name, values in expected.items()}
    actual["attn 1"][1, 2] = 1

    with pytest.raises(AssertionError, match=r"attn 1: 1 of 6 differ: \(1, 2\)"):
        assert_same_trace(actual, expected)


def test_a_missing_tap_fails():
    with pytest.raises(AssertionError):
        assert_same_trace({}, {"q 0": np.zeros(1, np.uint16)})
