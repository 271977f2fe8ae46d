"""The twin's operations that only move and round, on one core."""

import pytest

from tests.twin.bits import normal


@pytest.mark.parametrize("hidden_size", [576, 2048])
def test_rms_norm(benchmark, rate, one_core, hidden_size: int):
    benchmark.group = "rms_norm, one core"
    x, weight = normal(1, 256, hidden_size), normal(2, hidden_size)

    rate(lambda: one_core.rms_norm(x, weight, 1e-5), x.size * 4, "GB/s")


@pytest.mark.parametrize("intermediate_size", [1536, 8192])
def test_silu_and_mul(benchmark, rate, one_core, intermediate_size: int):
    benchmark.group = "silu_and_mul, one core"
    gate, up = normal(1, 64, intermediate_size), normal(2, 64, intermediate_size)

    rate(lambda: one_core.silu_and_mul(gate, up), gate.size * 6, "GB/s")
