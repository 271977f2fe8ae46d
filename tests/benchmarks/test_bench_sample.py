"""Choosing and scoring tokens over Llama 3's vocabulary, by the twin on one core."""

import numpy as np
import pytest

from tests.twin import sampling_contract as page

VOCAB = 128_256
KINDS = {
    "arg-max": {"temperature": 0},
    "drawn": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "20 logprobs": {"temperature": 0, "num_logprobs": 20},
}


@pytest.mark.parametrize("kind", KINDS)
def test_sample(benchmark, rate, one_core, kind: str):
    benchmark.group = "sample, one core"
    logits = np.random.default_rng(1).standard_normal((1, VOCAB), dtype=np.float32) * 3
    batch = page.sampling(page.rows(1, seed=7, **KINDS[kind]), max_logprobs=20)

    rate(lambda: one_core.sample(logits, batch), 1, "rows/s")
