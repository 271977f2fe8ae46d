"""No kernel writes before or behind its own memory, and every bit is still the twin's.

Sizes that no vector, tile or warp divides, and engines with room for one step and no more. Every
allocation begins as NaN here: what a kernel reads before anybody wrote it shows as well.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from engine.bindings import Library
from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits, normal
from tests.kernels.test_bits_num_tokens import CASES, ONE_BY_ONE, Case, residual_add
from tests.runtime.guarded import Guarded, decode_steps, link_guarded_library, prefill_steps

pytestmark = pytest.mark.gpu

ODD = (1, 7, 33)
LENGTHS = (1, 7, 9, 2041, 2047, 2049)  # of eight values a thread, 256 threads a block


@pytest.fixture(scope="module")
def guarded(gpu: Ops, tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    return link_guarded_library(tmp_path_factory.mktemp("guarded"))


@pytest.fixture(scope="module")
def guarded_gpu(guarded: Guarded) -> Iterator[Ops]:
    with Ops(guarded.library, "cuda") as ops:
        yield ops


@pytest.mark.parametrize("num_values", LENGTHS)
def test_elementwise_operations_stay_within_any_length(
    guarded: Guarded, guarded_gpu: Ops, twin: Ops, num_values: int
):
    x, y = normal(1, 1, num_values), normal(2, 1, num_values)
    floats = np.linspace(-9, 9, num_values, dtype=np.float32)

    with guarded.watched():
        found = guarded_gpu.residual_add(x, y), guarded_gpu.silu_and_mul(x, y)
        powers = guarded_gpu.exp2(floats)

    assert_same_bits(found[0], twin.residual_add(x, y))
    assert_same_bits(found[1], twin.silu_and_mul(x, y))
    assert_same_bits(powers, twin.exp2(floats))


@pytest.mark.parametrize(
    ("num_tokens", "out_features"), [(1, 65), (3, 63), (9, 331), (65, 72), (33, 63), (129, 331)]
)
def test_linear_layers_stay_within_any_number_of_rows(
    guarded: Guarded, guarded_gpu: Ops, twin: Ops, num_tokens: int, out_features: int
):
    x, weight = normal(1, num_tokens, 576), normal(2, out_features, 576, scale=0.05)

    with guarded.watched():
        found = guarded_gpu.linear(x, weight), guarded_gpu.linear_f32(x, weight)

    assert_same_bits(found[0], twin.linear(x, weight))
    assert_same_bits(found[1], twin.linear_f32(x, weight))


@pytest.mark.parametrize("num_tokens", ODD)
@pytest.mark.parametrize("case", [c for c in CASES if c.__name__ != "uniform"])
def test_every_operation_stays_within_its_arrays(
    guarded: Guarded, guarded_gpu: Ops, twin: Ops, case: Case, num_tokens: int
):
    with guarded.watched():
        found = case(num_tokens)(guarded_gpu)

    assert_same_bits(found, ONE_BY_ONE.get(case, case)(num_tokens)(twin))


@pytest.mark.parametrize("num_seqs", [1, 2, 5, 8, 9, 33, 70, 130])
def test_a_tight_engine_decodes_within_its_memory(
    guarded: Guarded, library: Library, num_seqs: int
):
    with guarded.watched():
        found = decode_steps(guarded.library, "cuda", num_seqs)

    for value, expected in zip(found, decode_steps(library, "cpu", num_seqs), strict=True):
        assert_same_bits(value, expected)


@pytest.mark.parametrize("num_tokens", [1, 7, 33, 65, 129])
def test_a_tight_engine_prefills_within_its_memory(
    guarded: Guarded, library: Library, num_tokens: int
):
    with guarded.watched():
        found = prefill_steps(guarded.library, "cuda", num_tokens)

    for value, expected in zip(found, prefill_steps(library, "cpu", num_tokens), strict=True):
        assert_same_bits(value, expected)


def test_one_value_too_many_is_seen(guarded: Guarded, guarded_gpu: Ops):
    with (
        guarded.overrunning(),
        pytest.raises(AssertionError, match="wrote before or behind"),
        guarded.watched(),
    ):
        residual_add(1)(guarded_gpu)


def test_asked_for_nothing_every_operation_does_nothing(guarded: Guarded):
    with guarded.watched():
        assert guarded.call_with_nothing("cuda") == ""
