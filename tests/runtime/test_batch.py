"""The door: each precondition of a step, broken alone, is refused by field, limit and value.

After every refusal the same engine computes the same bits as before, and nothing was written.
"""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch, SequenceSlice, build_batch
from engine.errors import InvalidArgument
from engine.model_runner import ModelRunner
from tests.system.trace import cache_of, tokens
from tests.twin.bits import assert_same_bits

# 12 blocks of 16, sequences to 100 tokens (7 blocks), steps of 40 tokens and 3 sequences.
ROOM = {"num_blocks": 12, "max_seq_len": 100, "max_num_tokens": 40, "max_num_seqs": 3}
INDEX_ARRAYS = (
    "input_ids",
    "positions",
    "slot_mapping",
    "cu_seqlens_q",
    "seq_lens",
    "block_tables",
    "logits_indices",
)


@pytest.fixture(scope="module")
def runner(make_runner: Callable[..., ModelRunner]) -> ModelRunner:
    return make_runner("toy", **ROOM)


def good_batch() -> Batch:
    """20 new tokens on empty blocks, 1 after 16, 3 after 30; blocks 3 4 | 7 5 | 1 0 2."""
    return build_batch(
        [
            SequenceSlice(tokens(0, 20), 0, [3, 4]),
            SequenceSlice(tokens(1, 1), 16, [7, 5]),
            SequenceSlice(tokens(2, 3), 30, [1, 0, 2]),
        ],
        16,
        "all",
    )


@pytest.fixture(scope="module")
def good(runner: ModelRunner) -> np.ndarray:
    """The logits of the good batch, over blocks that hold a known sequence."""
    return run(runner, good_batch())


def run(runner: ModelRunner, batch: Batch) -> np.ndarray:
    runner.fill_blocks([7, 1, 0], 0x3C00)
    return runner.forward(batch).logits


def raw(runner: ModelRunner, batch: Batch, **fields: object) -> None:
    """engine_forward with some fields of the C struct replaced."""
    library = runner.library
    struct = library.batch(batch)
    for name, value in fields.items():
        setattr(struct, name, value)
    runner.engine._call("engine_forward", struct, library.ffi.NULL, 0)


def assert_refused(
    runner: ModelRunner, good: np.ndarray, batch: Batch, message: str, **fields: object
) -> None:
    runner.fill_blocks(range(12), 0x3C00)
    table = list(range(12))
    before = cache_of(runner, 192, table)

    with pytest.raises(InvalidArgument, match=message):
        raw(runner, batch, **fields)

    after = cache_of(runner, 192, table)
    for name in before:
        assert_same_bits(after[name], before[name])
    assert_same_bits(run(runner, good_batch()), good)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_tokens", 0, r"num_tokens is 0, must be 1 .. 40 \(max_num_tokens\)"),
        ("num_tokens", -1, "num_tokens is -1, must be 1 .. 40"),
        ("num_tokens", 41, "num_tokens is 41, must be 1 .. 40"),
        ("num_tokens", 2**31 - 1, "num_tokens is 2147483647, must be 1 .. 40"),
        ("num_tokens", 23, r"num_logits is 24, must be 0 .. 23"),
        ("num_tokens", 25, r"cu_seqlens_q\[3\] is 24, but num_tokens is 25"),
        ("num_seqs", 0, r"num_seqs is 0, must be 1 .. 3 \(max_num_seqs\)"),
        ("num_seqs", -1, "num_seqs is -1, must be 1 .. 3"),
        ("num_seqs", 4, "num_seqs is 4, must be 1 .. 3"),
        ("num_seqs", 2, r"cu_seqlens_q\[2\] is 21, but num_tokens is 24"),
        ("num_logits", -1, r"num_logits is -1, must be 0 .. 24 \(num_tokens\)"),
        ("num_logits", 25, "num_logits is 25, must be 0 .. 24"),
        ("max_blocks_per_seq", 0, r"max_blocks_per_seq is 0, must be 1 .. 7 \(max_seq_len 100\)"),
        ("max_blocks_per_seq", -1, "max_blocks_per_seq is -1, must be 1 .. 7"),
        ("max_blocks_per_seq", 8, "max_blocks_per_seq is 8, must be 1 .. 7"),
        (
            "max_blocks_per_seq",
            1,
            r"seq_lens\[0\] is 20 and needs 2 blocks.*max_blocks_per_seq is 1",
        ),
    ],
)
def test_a_wrong_count_is_refused(
    runner: ModelRunner, good: np.ndarray, field: str, value: int, message: str
):
    # counts are checked before the arrays that they measure are read
    assert_refused(runner, good, good_batch(), message, **{field: value})


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("input_ids", 5, -1, r"input_ids\[5\] is -1, must be 0 .. 319 \(vocab_size - 1\)"),
        ("input_ids", 23, 320, r"input_ids\[23\] is 320, must be 0 .. 319"),
        ("input_ids", 0, -(2**31), r"input_ids\[0\] is -2147483648"),
        ("positions", 0, 1, r"positions\[0\] is 1, but token 0 of sequence 0 is at 0"),
        ("positions", 19, -1, r"positions\[19\] is -1, but token 19 of sequence 0 is at 19"),
        ("positions", 20, 15, r"positions\[20\] is 15, but token 0 of sequence 1 is at 16"),
        ("positions", 22, 30, r"positions\[22\] is 30, but token 1 of sequence 2 is at 31"),
        (
            "slot_mapping",
            0,
            49,
            r"slot_mapping\[0\] is 49, but position 0 of sequence 0 is slot 48",
        ),
        ("slot_mapping", 20, -1, r"slot_mapping\[20\] is -1, but position 16 .* is slot 80"),
        ("slot_mapping", 23, 192, r"slot_mapping\[23\] is 192, but position 32 .* is slot 32"),
        ("cu_seqlens_q", 0, 1, r"cu_seqlens_q\[0\] is 1, must be 0"),
        ("cu_seqlens_q", 1, 0, r"cu_seqlens_q\[1\] is 0 after 0"),
        ("cu_seqlens_q", 1, 21, r"positions|seq_lens|cu_seqlens_q"),
        ("cu_seqlens_q", 2, 20, r"cu_seqlens_q\[2\] is 20 after 20"),
        ("cu_seqlens_q", 1, -3, r"cu_seqlens_q\[1\] is -3 after 0"),
        ("cu_seqlens_q", 3, 25, r"cu_seqlens_q\[3\] is 25 .*24"),
        ("cu_seqlens_q", 2, 2**31 - 1, r"cu_seqlens_q\[2\] is 2147483647"),
        ("seq_lens", 0, 0, r"seq_lens\[0\] is 0, must be 20 .* 100 \(max_seq_len\)"),
        ("seq_lens", 0, 19, r"seq_lens\[0\] is 19, must be 20"),
        ("seq_lens", 1, -5, r"seq_lens\[1\] is -5, must be 1"),
        ("seq_lens", 2, 101, r"seq_lens\[2\] is 101, must be 3 .* 100"),
        ("seq_lens", 2, 2**31 - 1, r"seq_lens\[2\] is 2147483647"),
        ("seq_lens", 2, 49, r"seq_lens\[2\] is 49 and needs 4 blocks, but max_blocks_per_seq is 3"),
        ("seq_lens", 1, 18, r"positions\[20\] is 16, but token 0 of sequence 1 is at 17"),
        ("block_tables", (0, 1), 12, r"block_tables\[0\]\[1\] is 12, but the cache has 12 blocks"),
        ("block_tables", (2, 0), -1, r"block_tables\[2\]\[0\] is -1, but the cache has 12 blocks"),
        ("block_tables", (2, 2), 2**31 - 1, r"block_tables\[2\]\[2\] is 2147483647"),
        ("block_tables", (1, 1), 6, r"slot_mapping\[20\] is 80, but position 16 .* is slot 96"),
        ("logits_indices", 0, -1, r"logits_indices\[0\] is -1 after -1: must ascend below 24"),
        ("logits_indices", 5, 4, r"logits_indices\[5\] is 4 after 4"),
        ("logits_indices", 23, 24, r"logits_indices\[23\] is 24"),
        ("logits_indices", 23, 22, r"logits_indices\[23\] is 22 after 22"),
    ],
)
def test_a_wrong_entry_is_refused(
    runner: ModelRunner, good: np.ndarray, field: str, index: int, value: int, message: str
):
    batch = good_batch()
    getattr(batch, field)[index] = value

    assert_refused(runner, good, batch, message)


@pytest.mark.parametrize("field", INDEX_ARRAYS)
def test_a_null_array_is_refused(runner: ModelRunner, good: np.ndarray, field: str):
    null = runner.library.ffi.NULL

    assert_refused(runner, good, good_batch(), "null", **{field: null})


def test_two_tokens_for_one_slot_are_refused(runner: ModelRunner, good: np.ndarray):
    # two sequences that decode into the same block
    batch = build_batch([SequenceSlice([1], 16, [7, 5]), SequenceSlice([2], 16, [1, 5])], 16, "all")

    assert_refused(runner, good, batch, r"slot_mapping\[1\] is 80, which this step writes twice")


def test_one_sequence_with_the_same_block_twice_is_refused(runner: ModelRunner, good: np.ndarray):
    batch = build_batch([SequenceSlice(tokens(0, 17), 0, [3, 3])], 16, "all")

    assert_refused(runner, good, batch, r"slot_mapping\[16\] is 48, which this step writes twice")


def test_a_shared_prefix_is_no_error(runner: ModelRunner):
    batch = build_batch([SequenceSlice([1], 16, [7, 5]), SequenceSlice([1], 16, [7, 6])], 16, "all")

    logits = run(runner, batch)

    assert_same_bits(logits[0], logits[1])


def test_padding_of_the_block_tables_is_never_read(runner: ModelRunner, good: np.ndarray):
    batch = good_batch()
    batch.block_tables[0, 2] = batch.block_tables[1, 2] = -(2**31)

    assert_same_bits(run(runner, batch), good)


@pytest.mark.parametrize("null", ["logits", "next_ids"])
def test_either_output_may_be_left_out(runner: ModelRunner, good: np.ndarray, null: str):
    runner.fill_blocks([7, 1, 0], 0x3C00)
    batch = good_batch()
    logits = np.empty((24, runner.config.vocab_size), np.float32)
    ids = np.empty(24, np.int32)

    if null == "logits":
        runner.engine.forward(batch, next_ids=ids)
        assert (ids == good.argmax(-1)).all()
    else:
        runner.engine.forward(batch, logits=logits)
        assert_same_bits(logits, good)


def test_exactly_the_largest_step_runs(runner: ModelRunner):
    slices = [SequenceSlice(tokens(i, n), 0, [4 * i, 4 * i + 1]) for i, n in enumerate((20, 19, 1))]

    assert np.isfinite(runner.forward(build_batch(slices, 16, "all")).logits).all()


def test_the_longest_sequence_runs_to_its_last_token(runner: ModelRunner):
    table = list(range(7))
    for start, length in ((0, 40), (40, 40), (80, 19), (99, 1)):
        batch = build_batch([SequenceSlice(tokens(start, length), start, table)], 16)
        assert np.isfinite(runner.forward(batch).logits).all()
    too_long = build_batch([SequenceSlice([1], 100, table)], 16)

    with pytest.raises(InvalidArgument, match=r"seq_lens\[0\] is 101"):
        runner.forward(too_long)


@settings(max_examples=60)
@given(
    st.sampled_from(INDEX_ARRAYS),
    st.integers(0, 10_000),
    st.one_of(st.integers(-3, 40), st.integers(-(2**31), 2**31 - 1)),
)
def test_any_single_change_is_refused_or_computed(
    runner: ModelRunner, good: np.ndarray, field: str, place: int, value: int
):
    batch = good_batch()
    array = getattr(batch, field).reshape(-1)
    array[place % array.size] = value

    try:
        raw(runner, batch)
    except InvalidArgument as error:
        assert any(name in str(error) for name in INDEX_ARRAYS)

    assert_same_bits(run(runner, good_batch()), good)
