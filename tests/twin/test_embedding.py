"""The embedding: rows copied, bit for bit, NaN payloads included."""

import numpy as np
import pytest

from engine.errors import InvalidArgument
from engine.ops import Ops
from tests.twin.bits import assert_same_bits


def table(vocab_size: int, hidden_size: int) -> np.ndarray:
    return (
        np.random.default_rng(0).integers(0, 1 << 16, (vocab_size, hidden_size)).astype(np.uint16)
    )


@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(1, 64), (17, 64), (320, 128), (331, 704)])
def test_every_row_is_copied_bit_for_bit(twin: Ops, vocab_size: int, hidden_size: int):
    rows = table(vocab_size, hidden_size)
    ids = np.random.default_rng(1).permutation(vocab_size).astype(np.int32)

    assert_same_bits(twin.embedding(rows, ids), rows[ids])


def test_a_repeated_id_gives_a_repeated_row(twin: Ops):
    rows = table(20, 64)

    result = twin.embedding(rows, np.array([19, 19, 0, 19], np.int32))

    assert_same_bits(result, rows[[19, 19, 0, 19]])


@pytest.mark.parametrize("bad", [-1, 20])
def test_an_id_outside_the_table_is_refused_by_index_and_value(twin: Ops, bad: int):
    with pytest.raises(InvalidArgument, match=rf"ids\[2\] is {bad}, must be 0 .. 19"):
        twin.embedding(table(20, 64), np.array([0, 1, bad], np.int32))
