import numpy as np
import pytest

from tests.kernels.inputs import assert_same_bits


def test_one_flipped_bit_is_a_failure_that_names_its_place():
    twin = np.arange(12, dtype=np.uint16).reshape(3, 4)
    gpu = twin.copy()
    gpu[1, 2] ^= 1

    with pytest.raises(AssertionError, match=r"1 of 12 differ: \(1, 2\): gpu 0007 twin 0006"):
        assert_same_bits(gpu, twin)


def test_zeros_of_different_sign_differ():
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        assert_same_bits(np.array([-0.0], np.float32), np.array([0.0], np.float32))


def test_nan_payloads_differ_unless_the_test_says_they_may():
    nans = np.array([0x7FFFFFFF, 0x7FC00000], np.uint32).view(np.float32)

    assert_same_bits(nans[:1], nans[1:], any_nan=True)
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        assert_same_bits(nans[:1], nans[1:])


def test_a_nan_on_one_side_alone_is_always_a_difference():
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        assert_same_bits(np.array([np.nan], np.float32), np.ones(1, np.float32), any_nan=True)
