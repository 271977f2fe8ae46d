"""The arrays of a step, against a model that walks token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Batch, SequenceSlice, build_batch, slot_mapping
from engine.errors import InvalidArgument

BLOCK_SIZES = (16, 32, 64, 128)


@st.composite
def slices(draw: st.DrawFn, block_size: int) -> list[SequenceSlice]:
    count = draw(st.integers(1, 5))
    blocks = draw(st.permutations(range(60)))
    result = []
    for i in range(count):
        start = draw(st.integers(0, 4 * block_size))
        new = draw(st.integers(1, 2 * block_size + 1))
        needed = -(-(start + new) // block_size)
        spare = draw(st.integers(0, 2))
        table = blocks[12 * i : 12 * i + needed + spare]
        result.append(
            SequenceSlice(
                draw(st.lists(st.integers(0, 9), min_size=new, max_size=new)), start, table
            )
        )
    return result


@given(st.data(), st.sampled_from(BLOCK_SIZES), st.sampled_from(["last", "all", "none"]))
def test_a_batch_is_its_slices_token_by_token(data: st.DataObject, block_size: int, logits: str):
    parts = data.draw(slices(block_size))

    batch = build_batch(parts, block_size, logits)

    row = 0
    wanted = []
    for i, part in enumerate(parts):
        assert batch.cu_seqlens_q[i] == row
        for offset, token_id in enumerate(part.token_ids):
            position = part.start + offset
            assert batch.input_ids[row] == token_id
            assert batch.positions[row] == position
            block = part.block_table[position // block_size]
            assert batch.slot_mapping[row] == block * block_size + position % block_size
            if logits == "all" or (logits == "last" and offset == len(part.token_ids) - 1):
                wanted.append(row)
            row += 1
        assert batch.seq_lens[i] == part.start + len(part.token_ids)
        used = -(-int(batch.seq_lens[i]) // block_size)
        assert batch.block_tables[i, :used].tolist() == list(part.block_table[:used])
        assert not batch.block_tables[i, used:].any()
    assert batch.cu_seqlens_q.tolist()[-1] == row == len(batch.input_ids)
    assert batch.logits_indices.tolist() == wanted


@given(st.data(), st.sampled_from(BLOCK_SIZES))
def test_every_array_is_contiguous_int32(data: st.DataObject, block_size: int):
    batch = build_batch(data.draw(slices(block_size)), block_size)

    for name, values in vars(batch).items():
        assert values.dtype == np.int32, name
        assert values.flags.c_contiguous, name


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 0, []),
        (0, 1, [112]),
        (15, 17, [127, 32]),
        (16, 16, []),
        (31, 32, [47]),
        (14, 18, [126, 127, 32, 33]),
    ],
)
def test_slots_follow_the_block_table(start: int, end: int, expected: list[int]):
    result = slot_mapping([7, 2], start, end, 16)

    assert result.tolist() == expected
    assert result.dtype == np.int32


@pytest.mark.parametrize(("start", "end"), [(0, 33), (32, 33), (-1, 2), (5, 4)])
def test_slots_outside_the_block_table_are_refused(start: int, end: int):
    with pytest.raises(
        InvalidArgument, match=f"positions {start} .. {end} do not fit 2 blocks of 16"
    ):
        slot_mapping([7, 2], start, end, 16)


@pytest.mark.parametrize(
    "parts",
    [[], [SequenceSlice([], 0, [0])], [SequenceSlice([1], 0, [0]), SequenceSlice([], 3, [1])]],
)
def test_a_step_without_a_token_is_refused(parts: list[SequenceSlice]):
    with pytest.raises(InvalidArgument, match="a new token"):
        build_batch(parts, 16)


@pytest.mark.parametrize(
    ("start", "count", "blocks"), [(0, 17, 1), (16, 1, 1), (0, 1, 0), (31, 2, 2)]
)
def test_a_block_table_that_is_too_short_is_refused(start: int, count: int, blocks: int):
    with pytest.raises(InvalidArgument, match=f"do not fit {blocks} blocks of 16"):
        build_batch([SequenceSlice([1] * count, start, list(range(blocks)))], 16)


def test_a_batch_cannot_be_reassigned():
    batch: Batch = build_batch([SequenceSlice([1], 0, [0])], 16)

    with pytest.raises(AttributeError):
        batch.input_ids = np.zeros(1, np.int32)


def test_the_slices_are_not_changed():
    ids, table = [1, 2, 3], [5, 4]
    build_batch([SequenceSlice(ids, 13, table)], 16)

    assert (ids, table) == ([1, 2, 3], [5, 4])
