"""Which sequences prefill: read by kernels on a GPU alone, so asked of the C function itself."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.runtime.wrapped_twin import build_wrapped_twin


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path: Path = tmp_path_factory.mktemp("prefill_seqs") / "libprefill_seqs.so"
    build_wrapped_twin(path, "tell_prefill_seqs.c", [])
    return ctypes.CDLL(str(path))


@example([1])
@example([2, 1, 2])
@given(st.lists(st.integers(1, 4), min_size=1, max_size=9))
def test_a_sequence_of_more_than_one_new_token_prefills(told: ctypes.CDLL, num_new: list[int]):
    starts = np.cumsum([0, *num_new], dtype=np.int32)
    seqs = np.full(len(num_new), -1, np.int32)

    count = told.tell_prefill_seqs(
        starts.ctypes.data_as(ctypes.c_void_p),
        len(num_new),
        seqs.ctypes.data_as(ctypes.c_void_p),
    )

    assert seqs[:count].tolist() == [i for i, new in enumerate(num_new) if new > 1]
