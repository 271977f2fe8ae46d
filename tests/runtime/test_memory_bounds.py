"""Nothing writes before or behind its own memory: the twin's operations, and whole tight engines.

The kernels are put to the same in tests/kernels/test_memory_bounds.py.
"""

import numpy as np
import pytest

from engine.ops import Ops
from tests.kernels.test_bits_num_tokens import CASES, ONE_BY_ONE, Case, residual_add
from tests.runtime.guarded import Guarded, build_guarded_twin, decode_steps, prefill_steps


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    return build_guarded_twin(tmp_path_factory.mktemp("guarded"))


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_an_operation_stays_within_its_arrays(guarded: Guarded, case: Case, num_tokens: int):
    with guarded.watched(), Ops(guarded.library, "cpu", num_threads=1) as ops:
        if case.__name__ == "uniform":  # computed on the host, from no memory of a device
            ops.residual_add(*np.ones((2, 1), np.uint16))
        ONE_BY_ONE.get(case, case)(num_tokens)(ops)


@pytest.mark.parametrize("num_seqs", [1, 9])
def test_a_tight_engine_decodes_within_its_memory(guarded: Guarded, num_seqs: int):
    with guarded.watched():
        decode_steps(guarded.library, "cpu", num_seqs)


@pytest.mark.parametrize("num_tokens", [1, 33])
def test_a_tight_engine_prefills_within_its_memory(guarded: Guarded, num_tokens: int):
    with guarded.watched():
        prefill_steps(guarded.library, "cpu", num_tokens)


def test_one_value_too_many_is_seen(guarded: Guarded):
    with (
        guarded.overrunning(),
        pytest.raises(AssertionError, match="wrote before or behind"),
        guarded.watched(),
        Ops(guarded.library, "cpu") as ops,
    ):
        residual_add(1)(ops)


def test_a_tight_engine_that_writes_one_value_too_many_is_seen(guarded: Guarded):
    with (
        guarded.overrunning(),
        pytest.raises(AssertionError, match="wrote before or behind"),
        guarded.watched(),
    ):
        decode_steps(guarded.library, "cpu", 1)


def test_where_nothing_was_given_back_nothing_was_looked_at(guarded: Guarded):
    with pytest.raises(AssertionError, match="no guard was looked at"), guarded.watched():
        pass


def test_asked_for_nothing_every_operation_does_nothing(guarded: Guarded):
    with guarded.watched():
        assert guarded.call_with_nothing("cpu") == ""
