"""Linear layers of the twin on one core."""

import pytest

from tests.twin.bits import normal


@pytest.mark.parametrize("num_tokens", [1, 32])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(576, 1536), (2048, 8192)], ids=["576x1536", "2048x8192"]
)
def test_linear(benchmark, rate, one_core, num_tokens: int, in_features: int, out_features: int):
    benchmark.group = "linear, one core, packing included"
    x, weight = normal(1, num_tokens, in_features), normal(2, out_features, in_features)

    rate(lambda: one_core.linear(x, weight), num_tokens * in_features * out_features, "GMAC/s")


@pytest.mark.parametrize("steps", [4096])
def test_the_step_as_specified(benchmark, rate, one_core, steps: int):
    import numpy as np

    benchmark.group = "tensor-core step, the specification"
    c, a, b = np.zeros(steps, np.float32), normal(1, steps, 16), normal(2, steps, 16)

    rate(lambda: one_core.tensor_core_step(c, a, b), steps * 16, "GMAC/s")
