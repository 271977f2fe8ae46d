"""Embedding lookups through the packed layout: every row comes back as it went in."""

import numpy as np
import pytest

from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("hidden_size", [16, 48, 64, 80, 576, 2048])
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000])
def test_every_row_of_the_table_is_found(gpu: Ops, vocab_size: int, hidden_size: int):
    rng = np.random.default_rng(vocab_size)
    table = rng.integers(0, 1 << 16, (vocab_size, hidden_size), dtype=np.uint16)
    ids = rng.permutation(np.arange(vocab_size, dtype=np.int32))

    assert_same_bits(gpu.embedding(table, ids), table[ids])


def test_a_table_longer_than_one_staging_band_is_packed_whole(gpu: Ops):
    # 40,000 rows of 1024 values are 80 MB; a band is 32 MiB.
    rng = np.random.default_rng(1)
    table = rng.integers(0, 1 << 16, (40_000, 1024), dtype=np.uint16)
    ids = np.arange(40_000, dtype=np.int32)

    assert_same_bits(gpu.embedding(table, ids), table)
