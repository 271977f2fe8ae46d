"""Attention against float64, and relations that hold of every attention.

A relation compares two results of the engine itself. Both are within the budget of what is true, so
they are within its sum of each other; and where a budget is the measure, a change of the inputs
that breaks the relation is shown to be seen.
"""

import math

import numpy as np
import pytest

from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits, to_bf16
from tests.twin.paged import Sequence, attend, draw

TILE = 128


@pytest.mark.parametrize(("seq_len", "scale"), [(40, 1.0), (200, 3.0), (1100, 1.0), (1300, 3.0)])
def test_the_error_against_float64_is_within_the_budget(twin: Ops, seq_len: int, scale: float):
    sequence = draw(16, seq_len, 4, 2, 1, scale=scale)
    q, k, v = (contract.widen(x).astype(np.float64) for x in (sequence.q, sequence.k, sequence.v))

    result = contract.widen(attend(twin, [sequence])[0])

    for token in range(4):
        keys = slice(0, sequence.start + token + 1)
        for head in range(2):
            score = k[keys, 0] @ q[token, head] / 8
            p = np.exp(score - score.max())
            p /= p.sum()
            truth = p @ v[keys, 0]
            assert (
                np.abs(result[token, head] - truth)
                <= budget(q[token, head], k[keys, 0], v[keys, 0], p, truth)
            ).all()


def budget(q, k, v, p, truth) -> np.ndarray:
    """What rounding P and the result to bf16 and everything else to float32 can cost.

    Half a last place of the result; sixfold the random sum of P's roundings (2^-8 / sqrt 3 each,
    around the result, because the sum in the denominator is that of the rounded P); sixfold the
    error of a score of 64 products times what the row holds, and of the folds of the tiles.
    """
    place = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(truth), 1e-30))) - 7)
    score_error = 6 * math.sqrt(64) * 2.0**-24 * (np.abs(k) @ np.abs(q)).max() / 8
    mass = p @ np.abs(v)
    tiles = math.sqrt(-(-len(k) // TILE))
    spread = np.sqrt((p[:, None] ** 2 * (v - truth) ** 2).sum(0))
    return (
        place / 2 * (1 + 2.0**-7)
        + (2 * score_error + 12 * 2.0**-24 * tiles) * mass
        + 6 * 2.0**-8 / math.sqrt(3) * spread
    )


def test_the_output_lies_between_the_smallest_and_the_largest_value(twin: Ops):
    sequence = draw(17, 200, 10, scale=2)

    result = contract.widen(attend(twin, [sequence])[0])

    v = contract.widen(sequence.v)[:, 0]
    for token in range(10):
        seen = v[: sequence.start + token + 1]
        room = 2.0**-7 * np.abs(seen).max(0)
        assert (result[token, 0] >= seen.min(0) - room).all()
        assert (result[token, 0] <= seen.max(0) + room).all()


@pytest.mark.parametrize("power", [-20, 3, 20])
def test_a_power_of_two_in_v_passes_through(twin: Ops, power: int):
    sequence = draw(18, 300, 4, 2, 1)
    scaled = to_bf16(np.ldexp(contract.widen(sequence.v), power))

    result = attend(twin, [Sequence(sequence.q, sequence.k, scaled)])[0]

    expected = np.ldexp(contract.widen(attend(twin, [sequence])[0]), power)
    assert_same_bits(result, to_bf16(expected))


def test_a_power_of_two_may_move_from_q_to_k(twin: Ops):
    sequence = draw(19, 300, 4, 2, 1)
    q, k = to_bf16(contract.widen(sequence.q) * 2), to_bf16(contract.widen(sequence.k) / 2)

    result = attend(twin, [Sequence(q, k, sequence.v)])[0]

    assert_same_bits(result, attend(twin, [sequence])[0])


def test_repeated_kv_heads_equal_a_group(twin: Ops):
    grouped = draw(20, 150, 5, 8, 2, scale=2)
    expanded = Sequence(
        grouped.q,
        np.ascontiguousarray(np.repeat(grouped.k, 4, 1)),
        np.ascontiguousarray(np.repeat(grouped.v, 4, 1)),
    )

    assert_same_bits(attend(twin, [expanded])[0], attend(twin, [grouped])[0])


def test_v_of_one_value_gives_that_value(twin: Ops):
    sequence = draw(21, 333, 3, scale=3)
    v = np.full_like(sequence.v, to_bf16(np.array([1.3]))[0])

    result = attend(twin, [Sequence(sequence.q, sequence.k, v)])[0]

    assert (np.abs(result.astype(int) - int(v[0, 0, 0])) <= 1).all()


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
