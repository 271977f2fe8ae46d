"""RMSNorm: the fixed tree, the roundings, and small norms where epsilon shows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits, normal, to_bf16, wide

SIZES = (64, 128, 192, 576, 704, 1024, 1984, 2048, 2112, 4096, 6144, 8192)


def signed_weight(size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    return to_bf16(rng.uniform(0.3, 1.7, size) * rng.choice([-1, 1], size))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_contracts_bits(twin: Ops, size: int):
    x = np.concatenate([normal(size, 2, size), wide(size, 1, size, spread=6)])
    weight = signed_weight(size)

    assert_same_bits(twin.rms_norm(x, weight, 1e-5), contract.rms_norm(x, weight, 1e-5))


# No multiple of 64 is asked of the operation itself: a run of eight may end anywhere.
@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_any_width_has_the_contracts_bits(twin: Ops, size: int, seed: int):
    x, weight = wide(seed, 1, size, spread=3), normal(seed + 1, size)

    assert_same_bits(twin.rms_norm(x, weight, 1e-6), contract.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("rms", [1e-3, 3e-3, 0.02, 1.0, 1e3])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 1e-2])
def test_small_and_large_norms_have_the_contracts_bits(twin: Ops, rms: float, eps: float):
    x, weight = normal(1, 3, 576, scale=rms), signed_weight(576)

    assert_same_bits(twin.rms_norm(x, weight, eps), contract.rms_norm(x, weight, eps))


def test_a_massive_channel_has_the_contracts_bits(twin: Ops):
    x, weight = normal(2, 4, 704), signed_weight(704)
    x[:, 300] = to_bf16(np.array([1e3, -1e4, 1e5, 3e8]))

    assert_same_bits(twin.rms_norm(x, weight, 1e-5), contract.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("size", [64, 2048, 2112])
def test_every_channel_counts_and_counts_once(twin: Ops, size: int):
    # 64 size in one channel among ones: its share of the mean is known wherever it stands
    x = np.full((size, size), 0x3F80, np.uint16)
    np.fill_diagonal(x, to_bf16(np.full(1, np.sqrt(size) * 8))[0])

    result = twin.rms_norm(x, np.full(size, 0x3F80, np.uint16), 0.0)

    others = result[~np.eye(size, dtype=bool)]
    assert len(np.unique(others)) == 1
    assert len(np.unique(np.diagonal(result))) == 1


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        # 2^12 squared is 2^24: a 1 added to it alone is lost (tie to even); two ones first are not
        ((0, 1, 2), 2.0**24),  # one lane, ascending: 2^24 + 1 + 1
        ((0, 8, 16), 2.0**24),  # lanes 0, 1, 2: (0 xor 2) first meets one 1, then (0 xor 1) another
        ((0, 8, 24), 2.0**24 + 2),  # lanes 0, 1, 3: 1 and 3 meet by offset 2, before they meet 0
        ((0, 256, 512), 2.0**24),  # groups 0, 1, 2: 0 meets 2, then 1
        ((0, 256, 768), 2.0**24 + 2),  # groups 0, 1, 3: 1 and 3 meet first
        ((0, 8, 2048 + 8), 2.0**24 + 2),  # lane 1 of two blocks: added in the lane first
    ],
)
def test_the_tree_adds_in_the_written_order(twin: Ops, places: tuple[int, ...], expected: float):
    size = 4096
    row = np.zeros(size, np.float32)
    row[list(places)] = [2.0**12, 1, 1]
    assert contract.sum_of_squares(row) == expected

    # the two sums differ in the last bit of float32, far below bf16: eps takes all but that away
    x, weight = to_bf16(row)[None], np.full(size, 0x3F80, np.uint16)
    eps = -float(2.0**24 / size)
    result = contract.widen(twin.rms_norm(x, weight, eps))

    assert np.isinf(result[0, places[0]]) == (expected == 2.0**24)


def test_the_value_is_rounded_before_the_weight(twin: Ops):
    x, weight = normal(3, 64, 576), signed_weight(576)
    ones = np.full(576, 0x3F80, np.uint16)

    normalised = twin.rms_norm(x, ones, 1e-5)

    product = contract.bf(contract.widen(normalised) * contract.widen(weight))
    assert_same_bits(twin.rms_norm(x, weight, 1e-5), product)


def test_a_row_of_zeros_stays_zero(twin: Ops):
    x = np.zeros((1, 64), np.uint16)

    assert not twin.rms_norm(x, signed_weight(64), 1e-5).astype(np.uint16).__and__(0x7FFF).any()


def test_a_power_of_two_passes_when_eps_is_zero(twin: Ops):
    x, weight = normal(4, 3, 704), signed_weight(704)

    assert_same_bits(
        twin.rms_norm(to_bf16(contract.widen(x) * 16), weight, 0.0), twin.rms_norm(x, weight, 0.0)
    )


def test_rows_do_not_see_each_other(twin: Ops):
    x, weight = normal(5, 9, 576), signed_weight(576)
    alone = np.concatenate([twin.rms_norm(x[i : i + 1], weight, 1e-5) for i in range(9)])

    assert_same_bits(twin.rms_norm(x, weight, 1e-5), alone)
