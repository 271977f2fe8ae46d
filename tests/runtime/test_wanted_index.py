"""What a step tells of its wanted rows, asked of the C function itself.

The twin masks by positions alone; only kernels on a GPU read these lengths.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.batch import Batch, SequenceSlice, build_batch
from engine.bindings import Library
from tests.runtime.wrapped_twin import build_wrapped_twin

MOST_TOLD = 16


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path: Path = tmp_path_factory.mktemp("wanted_index") / "libwanted_index.so"
    build_wrapped_twin(path, "tell_wanted.c", [])
    return ctypes.CDLL(str(path))


@st.composite
def steps(draw) -> tuple[list[tuple[int, int]], list[int]]:
    """Sequences of (tokens before, new tokens), and rows of theirs."""
    runs = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=5))
    rows = st.integers(0, sum(new for _, new in runs) - 1)
    return runs, sorted(draw(st.sets(rows, min_size=1, max_size=MOST_TOLD)))


@example(([(0, 9)], [3]))  # in the midst of a prompt: it does not attend to what follows
@example(([(5, 1), (20, 4), (0, 2)], [0, 2, 6]))
@given(steps())
def test_a_wanted_row_is_a_sequence_that_ends_with_it(
    told: ctypes.CDLL, library: Library, step: tuple[list[tuple[int, int]], list[int]]
):
    runs, rows = step
    blocks = iter(np.random.default_rng(0).permutation(99).tolist())
    slices = [
        SequenceSlice([1] * new, before, [next(blocks) for _ in range(-(-(before + new) // 4))])
        for before, new in runs
    ]
    every = build_batch(slices, 4, "all")
    batch = Batch(**{**vars(every), "logits_indices": np.asarray(rows, np.int32)})
    struct, width = library.batch(batch), batch.block_tables.shape[1]
    positions, seq_lens = np.full(MOST_TOLD, -1, np.int32), np.full(MOST_TOLD, -1, np.int32)
    tables, longest = np.full((MOST_TOLD, width), -1, np.int32), np.zeros(1, np.int32)

    count = told.tell_wanted(
        ctypes.c_void_p(int(library.ffi.cast("uintptr_t", struct))),
        *(a.ctypes.data_as(ctypes.c_void_p) for a in (positions, seq_lens, tables, longest)),
    )

    if len(rows) == len(every.input_ids):
        assert count == 0  # all are wanted: nothing is left out
        return
    of_row = [i for i, (_, new) in enumerate(runs) for _ in range(new)]
    ends = [int(every.positions[row]) + 1 for row in rows]
    assert positions[:count].tolist() == [end - 1 for end in ends]
    assert seq_lens[:count].tolist() == ends
    assert longest[0] == max(ends)
    assert tables[:count].tolist() == [batch.block_tables[of_row[row]].tolist() for row in rows]
