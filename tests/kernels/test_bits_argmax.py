"""Arg-max: the GPU picks the twin's index, ties and NaN included."""

import numpy as np
import pytest

from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits

pytestmark = pytest.mark.gpu

VOCAB_SIZES = (1, 2, 31, 32, 33, 1023, 1024, 1025, 5000, 128_256)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_random_rows_give_the_twins_ids(gpu: Ops, twin: Ops, vocab_size: int):
    logits = np.random.default_rng(vocab_size).standard_normal((9, vocab_size), dtype=np.float32)

    assert_same_bits(gpu.argmax(logits), twin.argmax(logits))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_rows_full_of_ties_give_the_lowest_id(gpu: Ops, vocab_size: int):
    rng = np.random.default_rng(vocab_size)
    logits = rng.integers(0, 3, (16, vocab_size)).astype(np.float32)

    expected = np.argmax(logits, axis=1).astype(np.int32)  # numpy's rule is the same

    assert_same_bits(gpu.argmax(logits), expected)


def test_nan_infinities_and_zeros_give_the_twins_ids(gpu: Ops, twin: Ops):
    logits = np.zeros((7, 3000), np.float32)
    logits[0] = -np.inf
    logits[1, [2999, 17]] = np.nan
    logits[2, 40], logits[2, 41] = np.inf, np.nan
    logits[3] = -0.0
    logits[3, 5] = 0.0  # equal to the others: the lowest id wins
    logits[4, 2500] = np.inf
    logits[5] = np.nan
    logits[6, 1:] = -1e-45

    ids = gpu.argmax(logits)

    assert ids.tolist() == [0, 17, 41, 0, 2500, 0, 0]
    assert_same_bits(ids, twin.argmax(logits))
