"""Greedy steps in a row, without a look at the host: the steps one by one, to the bit."""

from collections.abc import Callable

import numpy as np
import pytest

from engine.batch import Batch, SequenceSlice, build_batch
from engine.errors import InvalidArgument
from engine.model_runner import ModelRunner
from tests.devices import skipped_without_device
from tests.system.trace import assert_same_trace, cache_of, tokens
from tests.twin.bits import assert_same_bits

TABLES = ([3, 9, 1, 11], [8, 0, 2, 10])
STARTS = (20, 30)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def runner(request: pytest.FixtureRequest, make_runner: Callable[..., ModelRunner]) -> ModelRunner:
    with skipped_without_device():
        return make_runner("toy", num_blocks=12, max_seq_len=64, device=request.param)


def first_step(runner: ModelRunner, ids: list[int], step: int = 0) -> Batch:
    return build_batch(
        [
            SequenceSlice([token], start + step, table)
            for token, start, table in zip(ids, STARTS, TABLES, strict=True)
        ],
        16,
    )


def with_whole_tables(batch: Batch) -> Batch:
    """The same step with block tables that reach as far as the sequences will grow."""
    return Batch(**{**vars(batch), "block_tables": np.array(TABLES, np.int32)})


def prefill(runner: ModelRunner) -> list[int]:
    runner.fill_blocks(range(12), 0x7FC0)
    for i, (start, table) in enumerate(zip(STARTS, TABLES, strict=True)):
        runner.forward(build_batch([SequenceSlice(tokens(i, start), 0, table)], 16, "none"))
    return [65, 66]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 13, 30])
def test_steps_in_a_row_are_the_steps_one_by_one(runner: ModelRunner, num_steps: int):
    ids = prefill(runner)
    expected = []
    for step in range(num_steps):
        output = runner.forward(first_step(runner, ids, step))
        ids = output.next_ids.tolist()
        expected.append(ids)
    caches = [cache_of(runner, s + num_steps, t) for s, t in zip(STARTS, TABLES, strict=True)]

    logits = np.empty((2, runner.config.vocab_size), np.float32)
    batch = with_whole_tables(first_step(runner, prefill(runner)))
    result = runner.engine.decode(batch, num_steps, logits)

    assert result.tolist() == expected
    assert_same_bits(logits, output.logits)
    for start, table, cache in zip(STARTS, TABLES, caches, strict=True):
        assert_same_trace(cache_of(runner, start + num_steps, table), cache)


def test_the_callers_batch_is_not_changed(runner: ModelRunner):
    batch = with_whole_tables(first_step(runner, prefill(runner)))
    before = {name: values.copy() for name, values in vars(batch).items()}

    runner.engine.decode(batch, 5)

    for name, values in vars(batch).items():
        assert (values == before[name]).all(), name


@pytest.mark.parametrize("num_steps", [0, -1])
def test_fewer_steps_than_one_are_refused(runner: ModelRunner, num_steps: int):
    library = runner.library
    struct = library.batch(batch := with_whole_tables(first_step(runner, prefill(runner))))
    ids = library.ffi.new("int32_t[2]")

    with pytest.raises(InvalidArgument, match=f"num_steps is {num_steps}"):
        runner.engine._call("engine_decode", struct, num_steps, ids)
    assert len(batch.seq_lens) == 2


def test_steps_beyond_the_longest_sequence_are_refused(runner: ModelRunner):
    batch = with_whole_tables(first_step(runner, prefill(runner)))

    with pytest.raises(InvalidArgument, match="seq_len"):
        runner.engine.decode(batch, 64 - 30 + 1)

    assert runner.engine.decode(batch, 64 - 30).shape == (34, 2)


def test_steps_beyond_the_block_tables_are_refused(runner: ModelRunner):
    # two blocks each: 32 slots, and the longer sequence has 31 tokens after the first step
    batch = first_step(runner, prefill(runner))

    with pytest.raises(InvalidArgument, match="block"):
        runner.engine.decode(batch, 3)

    assert runner.engine.decode(batch, 2).shape == (2, 2)


def test_a_sequence_with_two_new_tokens_is_refused(runner: ModelRunner):
    prefill(runner)
    slices = [SequenceSlice([1, 2], 20, TABLES[0]), SequenceSlice([1], 30, TABLES[1])]

    with pytest.raises(InvalidArgument):
        runner.engine.decode(build_batch(slices, 16), 1)


@pytest.mark.parametrize("indices", [[], [0], [1]])
def test_rows_without_logits_are_refused(runner: ModelRunner, indices: list[int]):
    batch = with_whole_tables(first_step(runner, prefill(runner)))
    partial = Batch(**{**vars(batch), "logits_indices": np.array(indices, np.int32)})

    with pytest.raises(InvalidArgument, match="logits"):
        runner.engine.decode(partial, 2)


def test_one_slot_for_two_sequences_in_a_later_step_is_refused_as_in_the_first(
    runner: ModelRunner,
):
    # both stand at 31 in blocks of their own; the next step would write slot 0 of block 2 twice
    prefill(runner)
    slices = [SequenceSlice([1], 31, [3, 9, 2]), SequenceSlice([1], 31, [8, 0, 2])]
    batch = build_batch(slices, 16)
    tables = np.array([[3, 9, 2], [8, 0, 2]], np.int32)

    with pytest.raises(InvalidArgument, match="twice"):
        runner.engine.decode(Batch(**{**vars(batch), "block_tables": tables}), 2)


def test_null_ids_are_refused(runner: ModelRunner):
    batch = with_whole_tables(first_step(runner, prefill(runner)))
    struct = runner.library.batch(batch)

    with pytest.raises(InvalidArgument, match="null"):
        runner.engine._call("engine_decode", struct, 1, runner.library.ffi.NULL)
