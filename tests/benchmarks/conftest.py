"""Rates beside times: what a benchmark did, per second and per core."""

from collections.abc import Callable

import pytest

from engine.bindings import Library
from engine.ops import Ops


@pytest.fixture(scope="session")
def one_core(library: Library):
    with Ops(library, "cpu", 1) as ops:
        yield ops


@pytest.fixture
def rate(benchmark) -> Callable[..., None]:
    """Run a call in the benchmark and note its rate in extra_info.

    Args of what it returns: the call, how much one call does, the unit of that per second
    ("GMAC/s" divides by 1e9, "GB/s" too, anything else by 1).
    """

    def run(call: Callable[[], object], amount: float, unit: str, rounds: int = 5) -> None:
        benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=1)
        scale = 1e9 if unit.startswith("G") else 1.0
        if benchmark.stats is not None:  # null when benchmarks are disabled
            median = benchmark.stats.stats.median
            benchmark.extra_info[unit] = round(amount / median / scale, 3)

    return run
