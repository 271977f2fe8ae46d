"""Edits kept for all rows at once are those that each row's sampler would keep alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine.edit_table
from engine.edit_table import EditTable
from engine.sampling import EDIT_BANNED, ROW, SequenceSampler
from engine.sampling_params import SamplingParams

NUM_ROWS = 5
VOCAB = 41
PARAMS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1, 1.5]),
    frequency_penalty=st.sampled_from([0, 0.5]),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 30), st.just(2.5), max_size=20),
    stop_token_ids=st.lists(st.integers(0, 12), max_size=2),
    min_tokens=st.integers(0, 4),
)
PROMPTS = st.lists(st.integers(0, 30), min_size=1, max_size=40)


class Rows:
    """A table, and for each of its rows a sampler that is told the same tokens one by one."""

    def __init__(self) -> None:
        self.rows = np.zeros(NUM_ROWS, ROW)
        self.table = EditTable(self.rows, VOCAB)
        self.alone: list[SequenceSampler] = []
        self.num_tokens = np.zeros(NUM_ROWS, np.int32)

    def add(self, params: SamplingParams, prompt: list[int]) -> None:
        row = len(self.alone)
        self.alone.append(SequenceSampler(params, prompt, seed=0))
        self.rows[row] = np.frombuffer(self.alone[row].row, ROW)[0]
        self.num_tokens[row] = len(prompt)
        if params.has_penalties or params.logit_bias or params.min_tokens:
            self.table.put(row, SequenceSampler(params, prompt, seed=0))

    def remove(self, row: int) -> None:
        last = len(self.alone) - 1
        self.table.remove(row)
        if row != last:
            self.rows[row] = self.rows[last]
            self.num_tokens[row] = self.num_tokens[last]
            self.alone[row] = self.alone[last]
            self.table.move(last, row)
        self.alone.pop()

    def note(self, tokens: dict[int, int]) -> None:
        for row, token_id in tokens.items():
            self.num_tokens[row] += 1
            self.alone[row].append(token_id)
        ids = np.array(list(tokens.values()), np.int32)
        self.table.note(np.array(list(tokens), np.int64), ids, self.num_tokens)

    def check(self) -> None:
        for row, alone in enumerate(self.alone):
            first, count = self.rows[row][["first_edit", "num_edits"]]
            edits = self.table.edits[first : first + count]
            assert edits.tobytes() == alone.edits.tobytes(), row


@given(st.data())
def test_whatever_comes_goes_and_is_noted_each_row_has_its_own_edits(data):
    rows = Rows()
    for _ in range(data.draw(st.integers(1, 12))):
        count = len(rows.alone)
        choice = data.draw(st.sampled_from(["add", "remove", "note", "note"]))
        if choice == "add" and count < NUM_ROWS:
            rows.add(data.draw(PARAMS), data.draw(PROMPTS))
        elif choice == "remove" and count:
            rows.remove(data.draw(st.integers(0, count - 1)))
        elif choice == "note" and count:
            chosen = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
            rows.note({row: data.draw(st.integers(0, VOCAB - 1)) for row in sorted(chosen)})
        rows.check()


def test_the_array_is_the_same_until_a_row_outgrows_it():
    rows = Rows()
    rows.add(SamplingParams(frequency_penalty=1), [1])
    edits = rows.table.edits
    for token_id in range(engine.edit_table.FIRST_ROOM):
        rows.note({0: token_id})
        assert rows.table.edits is edits

    rows.note({0: 40})

    assert rows.table.edits is not edits and len(rows.table.edits) == 2 * len(edits)
    rows.check()


@pytest.mark.parametrize("min_tokens", [1, 3])
def test_bans_end_with_the_token_that_is_enough(min_tokens: int):
    rows = Rows()
    rows.add(SamplingParams(min_tokens=min_tokens, stop_token_ids=[7]), [1, 2])
    banned = []
    for _ in range(4):
        rows.note({0: 5})
        banned.append(bool(rows.table.edits["flags"][0] & EDIT_BANNED))

    assert banned == [i + 1 < min_tokens for i in range(4)]
