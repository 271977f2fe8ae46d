"""Relations that hold of every attention: each compares two results of the engine itself.

Both results are within the budget of test_attention of what is true, so they are within its sum of
each other; and each relation is shown a change of the inputs that breaks it.
"""

import numpy as np
import pytest

from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import to_bf16
from tests.twin.paged import Sequence, attend, draw
from tests.twin.test_attention import budget


def last_row(twin: Ops, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """The result of the one new token and how far it may be from the truth."""
    q, k, v = (contract.widen(x).astype(np.float64) for x in (sequence.q, sequence.k, sequence.v))
    score = k[:, 0] @ q[0, 0] / 8
    p = np.exp(score - score.max())
    p /= p.sum()
    result = contract.widen(attend(twin, [sequence])[0])[0, 0]
    return result, budget(q[0, 0], k[:, 0], v[:, 0], p, p @ v[:, 0])


def agree(twin: Ops, one: Sequence, other: Sequence) -> bool:
    (left, left_budget), (right, right_budget) = last_row(twin, one), last_row(twin, other)
    return bool((np.abs(left - right) <= left_budget + right_budget).all())


@pytest.mark.parametrize("seq_len", [1, 2, 65, 128, 129, 600])
def test_every_key_twice_is_every_key_once(twin: Ops, seq_len: int):
    once = draw(31, seq_len, 1, scale=2)

    twice = Sequence(once.q, np.repeat(once.k, 2, 0), np.repeat(once.v, 2, 0))

    assert agree(twin, once, twice)


def test_the_newest_key_twice_is_not_every_key_once(twin: Ops):
    once = draw(31, 65, 1, scale=2)

    more = Sequence(
        *(np.concatenate((x, x[-1:])) if len(x) > 1 else x for x in (once.q, once.k, once.v))
    )

    assert not agree(twin, once, more)


@pytest.mark.parametrize("shift", [-64.0, -1.0, 0.5, 64.0])
def test_a_constant_added_to_every_score_changes_nothing(twin: Ops, shift: float):
    plain = draw(35, 300, 1, scale=2)
    q, k = plain.q.copy(), plain.k.copy()
    q[..., 63], k[..., 63] = to_bf16(np.array([8.0]))[0], 0
    shifted = k.copy()
    shifted[..., 63] = to_bf16(np.array([shift]))[0]  # 8 times it over sqrt(64): the shift itself

    assert agree(twin, Sequence(q, k, plain.v), Sequence(q, shifted, plain.v))
    shifted[::2, :, 63] = 0
    assert not agree(twin, Sequence(q, k, plain.v), Sequence(q, shifted, plain.v))
