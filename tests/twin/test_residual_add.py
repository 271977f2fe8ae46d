"""The residual's sum: one rounding, nearest even, all of bf16."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits, normal, wide


@pytest.mark.parametrize("draw", [normal, wide])
@pytest.mark.parametrize("count", [1, 7, 8, 64, 1000])
def test_the_contracts_bits(twin: Ops, draw, count: int):
    x, y = draw(count, count), draw(count + 1, count)

    assert_same_bits(twin.residual_add(x, y), contract.residual_add(x, y))


@given(st.lists(st.tuples(*[st.integers(0, 0xFFFF)] * 2), min_size=1, max_size=200))
def test_any_two_values_have_the_contracts_bits(twin: Ops, pairs: list[tuple[int, int]]):
    x, y = (np.array(column, np.uint16) for column in zip(*pairs, strict=True))

    assert_same_bits(twin.residual_add(x, y), contract.residual_add(x, y))


def test_the_sum_does_not_depend_on_the_order(twin: Ops):
    x, y = wide(1, 5000), wide(2, 5000)

    assert_same_bits(twin.residual_add(x, y), twin.residual_add(y, x))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0x3F80, 0x3B80, 0x3F80),  # 1 + 2^-8: a tie, to even
        (0x3F81, 0x3B80, 0x3F82),
        (0x3F80, 0x3B81, 0x3F81),  # a hair over the tie
        (0xBF80, 0xBB80, 0xBF80),
        (0x7F7F, 0x7F7F, 0x7F80),  # over the largest number
        (0x3F80, 0xBF80, 0x0000),
        (0x8000, 0x8000, 0x8000),
        (0x0001, 0x0001, 0x0002),  # denormals are kept
        (0x7F80, 0xFF80, 0x7FFF),  # inf - inf
    ],
)
def test_rounding_ties_overflow_and_denormals(twin: Ops, x: int, y: int, expected: int):
    result = twin.residual_add(np.array([x], np.uint16), np.array([y], np.uint16))

    assert result[0] == expected
