"""Rotary embedding: halves and not neighbours, three roundings, any mixture of positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits, normal, to_bf16, wide

MAX_POSITIONS = 512


def angle_table(seed: int = 0) -> np.ndarray:
    """cos and sin of random angles, bf16, one row a position; row 0 does not rotate."""
    angles = np.random.default_rng(seed).uniform(-np.pi, np.pi, (MAX_POSITIONS, 32))
    angles[0] = 0
    return to_bf16(np.concatenate([np.cos(angles), np.sin(angles)], 1))


@pytest.mark.parametrize("num_heads", [1, 3, 8, 9])
@pytest.mark.parametrize("draw", [normal, wide])
def test_the_contracts_bits(twin: Ops, draw, num_heads: int):
    x = draw(num_heads, 37, num_heads, 64)
    positions = np.random.default_rng(1).integers(0, MAX_POSITIONS, 37).astype(np.int32)
    table = angle_table()

    result = twin.rotary_embedding(x, table, positions)

    assert_same_bits(result, contract.rotary_embedding(x, table[positions]))


def test_position_zero_returns_the_input(twin: Ops):
    x = normal(2, 5, 2, 64)

    result = twin.rotary_embedding(x, angle_table(), np.zeros(5, np.int32))

    assert_same_bits(result, x)


def test_a_quarter_turn_pairs_the_halves_and_not_the_neighbours(twin: Ops):
    table = np.zeros((1, 64), np.uint16)
    table[0, 32:] = 0x3F80  # cos 0, sin 1
    x = to_bf16(np.arange(1, 65, dtype=np.float32)).reshape(1, 1, 64)

    result = contract.widen(twin.rotary_embedding(x, table, np.zeros(1, np.int32)))[0, 0]

    assert (result[:32] == -np.arange(33, 65)).all()
    assert (result[32:] == np.arange(1, 33)).all()


@settings(max_examples=30)
@given(st.lists(st.integers(0, MAX_POSITIONS - 1), min_size=1, max_size=40), st.integers(0, 99))
def test_each_token_takes_the_row_of_its_own_position(twin: Ops, positions: list[int], seed: int):
    x = normal(seed, len(positions), 2, 64)
    table = angle_table()

    together = twin.rotary_embedding(x, table, np.array(positions, np.int32))

    alone = [
        twin.rotary_embedding(x[i : i + 1], table, np.array([position], np.int32))
        for i, position in enumerate(positions)
    ]
    assert_same_bits(together, np.concatenate(alone))


def test_the_norm_of_each_pair_is_kept(twin: Ops):
    x, table = normal(3, 64, 4, 64), angle_table()
    positions = np.arange(64, dtype=np.int32)

    before, after = contract.widen(x), contract.widen(twin.rotary_embedding(x, table, positions))

    lengths = [np.hypot(v[..., :32], v[..., 32:]) for v in (before, after)]
    # three roundings of half a bf16 ulp on either member, and the table's own
    assert (np.abs(lengths[0] - lengths[1]) <= 4 * 2.0**-8 * lengths[0]).all()


@pytest.mark.parametrize("position", [-1, MAX_POSITIONS])
def test_a_position_outside_the_table_is_refused_by_index_and_value(twin: Ops, position: int):
    positions = np.array([0, position], np.int32)

    with pytest.raises(InvalidArgument, match=rf"positions\[1\] is {position}, must be 0 .. 511"):
        twin.rotary_embedding(normal(4, 2, 1, 64), angle_table(), positions)


def test_another_head_dim_is_refused(twin: Ops):
    with pytest.raises(InvalidArgument, match="head_dim is 32, must be 64"):
        twin.rotary_embedding(
            normal(5, 1, 1, 32), np.zeros((1, 32), np.uint16), np.zeros(1, np.int32)
        )
