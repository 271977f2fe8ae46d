"""The arrays updated in place lay out what build_batch makes of the same sequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine.running_batch
from engine.batch import SequenceSlice, build_batch
from engine.running_batch import RunningBatch
from engine.sequence import Sequence

B = 4
VOCAB = 100


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[list[int], int, int]]:
    """(tokens, computed, new) of up to five sequences."""
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3 * B))
        computed = draw(st.integers(0, len(tokens) - 1))
        drawn.append((tokens, computed, draw(st.integers(1, len(tokens) - computed))))
    return drawn


def filled(drawn: list[tuple[list[int], int, int]], removed: list[int]) -> RunningBatch:
    """A running batch of these rows, after others were there and left again."""
    running = RunningBatch(16, 4 * B, B, VOCAB)
    blocks = iter(np.random.default_rng(0).permutation(100).tolist())
    others = []
    for i, (tokens, computed, _) in enumerate(drawn):
        if i in removed:
            others.append(Sequence("other", [1] * (3 * B), 4 * B, is_watched=True))
            others[-1].block_table = [next(blocks) for _ in range(3)]
            running.add(others[-1], 2 * B)
        sequence = Sequence(f"r{i}", tokens, 4 * B)
        sequence.block_table = [next(blocks) for _ in range(-(-len(tokens) // B))]
        running.add(sequence, computed)
    for other in others:
        running.remove(other)
    return running


@given(rows(), st.lists(st.integers(0, 4), max_size=3))
def test_any_step_is_laid_out_as_from_scratch(drawn, removed):
    running = filled(drawn, removed)
    running.check_integrity()
    by_name = {f"r{i}": row for i, row in enumerate(drawn)}
    order = [by_name[sequence.request_id] for sequence in running.sequences]
    num_new = np.array([new for _, _, new in order], np.int32)

    batch = running.lay_out(num_new, None)

    slices = [
        SequenceSlice(tokens[computed : computed + new], computed, sequence.block_table)
        for (tokens, computed, new), sequence in zip(order, running.sequences, strict=True)
    ]
    expected = build_batch(slices, B)
    for name in ("input_ids", "positions", "slot_mapping", "cu_seqlens_q", "seq_lens"):
        assert getattr(batch, name).tolist() == getattr(expected, name).tolist(), name
        assert getattr(batch, name).dtype == np.int32, name
    assert batch.logits_indices.tolist() == expected.logits_indices.tolist()
    assert batch.block_tables.flags.c_contiguous
    for row, end in enumerate(batch.seq_lens.tolist()):
        used = -(-end // B)
        assert (batch.block_tables[row, :used] == expected.block_tables[row, :used]).all()


@pytest.mark.parametrize(("num_tokens", "width"), [(4, 1), (5, 2), (12, 4), (16, 4), (17, 5)])
def test_tables_are_as_wide_as_the_longest_needs(monkeypatch, num_tokens: int, width: int):
    monkeypatch.setattr(engine.running_batch, "FIRST_WIDTH", 1)
    running = RunningBatch(4, 5 * B, B, VOCAB)  # 5 blocks at most
    items = []
    for length in (2, num_tokens):
        items.append(Sequence(str(length), list(range(length)), 5 * B))
        items[-1].block_table = list(range(7, 7 - -(-length // B), -1))
        running.add(items[-1], 0)

    batch = running.lay_out(running.num_tokens[:2].copy(), None)

    assert batch.block_tables.shape == (2, width)
    assert batch.block_tables[1, : -(-num_tokens // B)].tolist() == items[1].block_table
    assert batch.block_tables[0, 0] == 7
    running.remove(items[1])
    assert running.lay_out(np.array([2], np.int32), None).block_tables.tolist() == [[7]]
    items[0].block_table.append(3)
    running.add_block(items[0])
    assert running.lay_out(np.array([2], np.int32), None).block_tables.tolist() == [[7, 3]]


def test_tables_stay_as_wide_as_those_who_stay_need(monkeypatch):
    monkeypatch.setattr(engine.running_batch, "FIRST_WIDTH", 1)
    running = RunningBatch(4, 5 * B, B, VOCAB)
    for i, blocks in enumerate([[1], [2, 3], [4, 5, 6]]):
        item = Sequence(f"r{i}", [i] * (len(blocks) * B), 5 * B, block_table=blocks)
        running.add(item, 0)

    running.remove(running.sequences[2])

    batch = running.lay_out(np.ones(2, np.int32), None)
    assert batch.block_tables.tolist() == [[1, 0], [2, 3]]


def decoding(count: int) -> RunningBatch:
    """Rows that decode: of 1, 2, .. tokens."""
    running = RunningBatch(8, 4 * B, B, VOCAB)
    for i in range(count):
        running.add(Sequence(f"r{i}", [i] * (i + 1), 4 * B, is_sampled=True), i)
        running.sequences[i].block_table = [i]
        running.add_block(running.sequences[i])
    return running


def test_the_batch_of_rows_that_decode_on_is_the_one_of_the_step_before():
    running = decoding(3)
    batch = running.lay_out_decode()

    running.advance(np.ones(3, np.int32), np.arange(3), np.array([7, 8, 9], np.int32))

    assert running.lay_out_decode() is batch
    assert batch.input_ids.tolist() == [7, 8, 9]
    assert batch.positions.tolist() == [1, 2, 3]
    assert batch.seq_lens.tolist() == [2, 3, 4]


def test_slots_whose_making_was_interrupted_are_not_believed():
    running = decoding(3)
    ones, rows = np.ones(3, np.int32), np.arange(3)
    running.lay_ahead(ones, [])
    running.advance(ones, rows, np.zeros(3, np.int32))
    assert running.is_ahead

    with pytest.raises(IndexError):
        running.lay_ahead(ones, [99])

    assert not running.is_ahead


def test_a_row_that_comes_goes_or_needs_a_wider_table_makes_another_batch(monkeypatch):
    monkeypatch.setattr(engine.running_batch, "FIRST_WIDTH", 1)
    running = decoding(3)
    for change in (
        lambda: running.remove(running.sequences[0]),
        lambda: running.add(Sequence("r9", [1], 4 * B), 0),
        lambda: (
            running.sequences[0].block_table.append(5),
            running.add_block(running.sequences[0]),
        ),
    ):
        batch = running.lay_out_decode()
        sampling = running.sampling(np.arange(running.num_seqs))

        change()

        assert running.lay_out_decode() is not batch
        assert len(running.sampling(np.arange(running.num_seqs)).rows) == running.num_seqs
        assert running.sampling(np.arange(running.num_seqs)) is not sampling


def test_the_logits_of_some_rows_and_of_every_token_of_others():
    running = filled([(list(range(6)), 0, 1), (list(range(9)), 2, 1), (list(range(3)), 0, 1)], [])

    batch = running.lay_out(np.array([2, 3, 3], np.int32), np.array([0, 2]), every=[1])

    assert batch.logits_indices.tolist() == [1, 2, 3, 4, 7]
    assert batch.logits_indices.dtype == np.int32


def test_a_sequence_that_leaves_takes_its_tokens_along_and_is_not_counted():
    running = RunningBatch(4, 16, B, VOCAB)
    kinds = {"is_watched": True, "wants_prompt_logits": True, "is_sampled": True}
    first, second = (Sequence(f"r{i}", [i, i], 8, **kinds) for i in range(2))
    for item in (first, second):
        item.block_table = [item.token_ids[0]]
        running.add(item, 0)
    running.token_ids[0, 2], running.num_tokens[0] = 7, 3

    running.remove(first)

    assert first.token_ids == [0, 0, 7] and first.row is None
    assert (second.row, running.num_seqs) == (0, 1)
    assert (running.num_watched, running.num_prompt_readers, running.num_sampled) == (1, 1, 1)
    running.check_integrity()
