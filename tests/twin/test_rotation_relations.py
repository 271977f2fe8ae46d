"""Relations that hold of every rotation, whatever its table: they need no reference.

Budgets: a rotated value carries one bf16 rounding of each product and of the sum, and the table's
own of cos and sin: 4 half spacings of the pair's norm, u = 2^-8 each.
"""

import numpy as np

from tests.twin.bits import to_bf16
from tests.twin.contract import widen

U = 2.0**-8
HEAD_DIM = 64
ROUNDINGS = 4  # cos or sin, the two products, the sum


def table() -> np.ndarray:
    angle = np.arange(600)[:, None] * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return to_bf16(np.concatenate((np.cos(angle), np.sin(angle)), 1).astype(np.float32))


def rotated(twin, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return twin.rotary_embedding(x, table(), positions.astype(np.int32))


def pair_norms(x: np.ndarray) -> np.ndarray:
    first, second = np.split(widen(x).astype(np.float64), 2, -1)
    norms = np.hypot(first, second)
    return np.concatenate((norms, norms), -1)


def test_two_rotations_are_one_by_the_sum_of_their_positions(twin):
    rng = np.random.default_rng(2)
    x = to_bf16(rng.standard_normal((40, 3, HEAD_DIM)).astype(np.float32))
    a, b = rng.integers(0, 300, 40), rng.integers(0, 300, 40)

    twice = widen(rotated(twin, rotated(twin, x, a), b))
    once = widen(rotated(twin, x, a + b))

    # the second rotation turns the first's error and adds its own; `once` has one of its own
    assert (np.abs(twice - once) <= 3 * ROUNDINGS * U * pair_norms(x)).all()
    other = widen(rotated(twin, x, a + b + 1))
    assert not (np.abs(twice - other) <= 3 * ROUNDINGS * U * pair_norms(x)).all()


def test_scores_depend_on_the_distance_alone(twin):
    rng = np.random.default_rng(4)
    q, k = (to_bf16(rng.standard_normal((40, 1, HEAD_DIM)).astype(np.float32)) for _ in range(2))
    a, b, shift = (rng.integers(0, 300, 40) for _ in range(3))

    def scores(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        left, right = widen(rotated(twin, q, a)), widen(rotated(twin, k, b))
        return (left.astype(np.float64) * right).sum((1, 2))

    # each operand of each product is off by ROUNDINGS * u of its pair's norm, in both scores
    budget = 2 * 2 * ROUNDINGS * U * (pair_norms(q) * pair_norms(k)).sum((1, 2))
    assert (np.abs(scores(a + shift, b + shift) - scores(a, b)) <= budget).all()
    assert not (np.abs(scores(a + shift, b) - scores(a, b)) <= budget).all()
