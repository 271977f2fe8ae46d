"""Arg-max: ties to the lowest id, NaN above all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.ops import Ops

NAN, INF = float("nan"), float("inf")


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([5], 0),
        ([1, 2, 3], 2),
        ([3, 2, 3], 0),
        ([2, 3, 3], 1),
        ([-1, -1, -1], 0),
        ([-INF, -INF], 0),
        ([-INF, -1e38], 1),
        ([INF, INF], 0),
        ([0.0, -0.0], 0),
        ([-0.0, 0.0], 0),  # the zeros are equal
        ([1, NAN, INF, NAN], 1),
        ([NAN, NAN], 0),
        ([INF, NAN], 1),
        ([NAN, INF], 0),
        ([1e-45, 0], 0),
    ],
)
def test_the_lowest_of_the_largest_wins(twin: Ops, row: list[float], expected: int):
    assert twin.argmax(rows(row)).tolist() == [expected]


@given(
    st.lists(
        st.lists(
            st.sampled_from([-INF, -1.0, -0.0, 0.0, 1.0, 2.0, INF, NAN]), min_size=9, max_size=9
        ),
        min_size=1,
        max_size=20,
    )
)
def test_any_rows(twin: Ops, values: list[list[float]]):
    def expected(row: list[float]) -> int:
        nans = [i for i, value in enumerate(row) if value != value]
        return nans[0] if nans else row.index(max(row))

    assert twin.argmax(rows(*values)).tolist() == [expected(row) for row in values]


@pytest.mark.parametrize("vocab_size", [1, 31, 320, 1023, 128256])
def test_the_last_the_first_and_any_place_of_any_row(twin: Ops, vocab_size: int):
    logits = np.random.default_rng(0).standard_normal((4, vocab_size)).astype(np.float32)
    places = [0, vocab_size - 1, vocab_size // 2, vocab_size // 3]
    logits[np.arange(4), places] = 100

    assert twin.argmax(logits).tolist() == places
