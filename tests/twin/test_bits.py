import numpy as np
import pytest

from tests.twin.bits import assert_same_bits


def test_one_flipped_bit_fails_and_is_shown_with_its_place():
    expected = np.arange(12, dtype=np.uint16).reshape(3, 4)
    actual = expected.copy()
    actual[2, 1] ^= 0x8000

    with pytest.raises(AssertionError, match=r"1 of 12 differ: \(2, 1\): 8009, expected 0009"):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    "other", [np.zeros(3, np.float32), np.zeros(2, np.uint32)], ids=["shape", "dtype"]
)
def test_another_shape_or_dtype_fails(other):
    with pytest.raises(AssertionError):
        assert_same_bits(np.zeros(2, np.float32), other)


def test_the_two_zeros_differ():
    with pytest.raises(AssertionError, match="1 of 1"):
        assert_same_bits(np.array([-0.0], np.float32), np.array([0.0], np.float32))


def test_equal_nans_are_equal():
    assert_same_bits(np.array([np.nan], np.float32), np.array([np.nan], np.float32))
