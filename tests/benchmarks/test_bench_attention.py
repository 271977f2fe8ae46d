"""Attention of the twin on one core: decode and prefill."""

import pytest

from tests.twin.paged import attend, draw


@pytest.mark.parametrize(("seq_len", "num_new"), [(1024, 1), (4096, 1), (128, 128), (512, 512)])
def test_attention(benchmark, rate, one_core, seq_len: int, num_new: int):
    benchmark.group = "attention, one core, 9 heads over 3, cache built in Python"
    sequence = draw(1, seq_len, num_new, 9, 3)
    keys = sum(seq_len - num_new + i + 1 for i in range(num_new))

    rate(lambda: attend(one_core, [sequence], 128), keys * 9 * 64 * 2, "GMAC/s", rounds=3)
