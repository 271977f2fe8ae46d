"""Linear layers: chunks of 512, k16 steps ascending, tails of every kind, nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bindings import Library
from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits, normal, to_bf16, wide

# Around the end of a step, of the first chunk and of the second.
IN_FEATURES = (16, 32, 48, 496, 512, 528, 576, 1008, 1024, 1040, 1536)
# Around the twin's panel (16), its task (64) and nothing at all.
OUT_FEATURES = (1, 2, 15, 16, 17, 63, 64, 65, 130)
NUM_TOKENS = (1, 2, 7, 8, 9, 31, 32, 33, 65)


@pytest.mark.parametrize("in_features", IN_FEATURES)
@pytest.mark.parametrize("draw", [normal, wide])
def test_every_k_tail_has_the_contracts_bits(twin: Ops, draw, in_features: int):
    x, w = draw(1, 3, in_features), draw(2, 18, in_features)

    assert_same_bits(twin.linear_f32(x, w), contract.linear_f32(x, w))
    assert_same_bits(twin.linear(x, w), contract.linear(x, w))


@pytest.mark.parametrize("out_features", OUT_FEATURES)
def test_every_n_tail_has_the_contracts_bits(twin: Ops, out_features: int):
    x, w = normal(3, 2, 528), normal(4, out_features, 528)

    assert_same_bits(twin.linear(x, w), contract.linear(x, w))


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_every_number_of_tokens_has_the_contracts_bits(twin: Ops, num_tokens: int):
    x, w = wide(5, num_tokens, 544), normal(6, 5, 544)

    assert_same_bits(twin.linear(x, w), contract.linear(x, w))


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_shape_has_the_contracts_bits(twin: Ops, m: int, n: int, steps: int, seed: int):
    x, w = wide(seed, m, 16 * steps, spread=6), wide(seed + 1, n, 16 * steps, spread=6)

    assert_same_bits(twin.linear_f32(x, w), contract.linear_f32(x, w))


def test_chunk_sums_are_added_in_ascending_order(twin: Ops):
    # chunks of 2^24, 1, 1, -2^24: ascending the ones are lost one after another
    x = np.zeros((1, 2048), np.uint16)
    x[0, [0, 512, 1024, 1536]] = to_bf16(np.array([2.0**24, 1, 1, -(2.0**24)]))
    w = np.full((1, 2048), 0x3F80, np.uint16)

    assert twin.linear_f32(x, w)[0, 0] == 0.0
    assert twin.linear_f32(np.ascontiguousarray(np.roll(x, 512)), w)[0, 0] == 2.0


def test_a_chunk_ends_at_512_and_not_elsewhere(twin: Ops):
    # 2^26 + 1.5 - 2^26: inside one chunk the step cuts the 1.5; a chunk border rounds it to even
    def total(border: int) -> float:
        x = np.zeros((1, 1024), np.uint16)
        x[0, border - 16], x[0, border] = to_bf16(np.array([2.0**24, 1.5]))
        return float(twin.linear_f32(x, np.full((1, 1024), 0x3F80, np.uint16))[0, 0])

    assert total(512) == 2.0**24 + 2  # rn(2^24 + 1.5), a new chunk
    for inside in (16, 256, 496, 528, 768, 1008):
        assert total(inside) == 2.0**24  # cut toward zero, the same chain


def test_steps_ascend(twin: Ops):
    # 1, then 2^26, then -2^26: ascending the 1 is cut away; in any other order of steps it stays
    x = np.zeros((1, 48), np.uint16)
    x[0, [0, 16, 32]] = to_bf16(np.array([1, 2.0**26, -(2.0**26)]))
    w = np.full((1, 48), 0x3F80, np.uint16)

    assert twin.linear_f32(x, w)[0, 0] == 0.0
    assert twin.linear_f32(np.ascontiguousarray(np.roll(x, 16)), w)[0, 0] == 0.0
    assert twin.linear_f32(np.ascontiguousarray(np.roll(x, 32)), w)[0, 0] == 1.0


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 16), (1, 130, 8192), (7, 65, 2048), (33, 17, 576), (129, 3, 1040), (130, 1, 8192)],
)
def test_integers_give_the_exact_product(twin: Ops, m: int, n: int, k: int):
    # up to 8 in magnitude: every partial sum is an integer below 2^24, so any order is exact
    rng = np.random.default_rng(k)
    x, w = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((m, k), (n, k)))

    result = twin.linear_f32(to_bf16(x), to_bf16(w))

    assert_same_bits(result, (x.astype(np.int64) @ w.astype(np.int64).T).astype(np.float32))


def test_integers_of_more_than_eight_bits_are_rounded_to_even(twin: Ops):
    # 256 .. 1023, each once: every second, then every fourth is a tie or lies between two bf16
    wanted = np.arange(256, 1024)
    x, w = np.zeros((2, 16), np.float32), np.zeros((len(wanted), 16), np.float32)
    x[:, 0], x[:, 1] = (1, -1), (1, -1)
    w[:, 0], w[:, 1] = wanted // 256 * 256, wanted % 256
    steps = np.where(wanted < 512, 2, 4)
    even = np.round(wanted / steps) * steps  # numpy's rule for halves is the same

    result = twin.linear(to_bf16(x), to_bf16(w))

    assert_same_bits(result, to_bf16(np.stack([even, -even]).astype(np.float32)))


@pytest.mark.parametrize(("n", "k"), [(1, 16), (33, 48), (70, 576)])
def test_one_hot_inputs_read_the_columns_of_the_weight(twin: Ops, n: int, k: int):
    # every weight is a number of its own, so a permuted or shifted one names itself
    w = (np.arange(n * k) % 0x7F00 + 0x80).astype(np.uint16).reshape(n, k)
    x = np.zeros((k, k), np.uint16)
    np.fill_diagonal(x, 0x3F80)

    assert_same_bits(twin.linear(x, w), np.ascontiguousarray(w.T))


def test_the_bf16_result_is_the_float32_one_rounded(twin: Ops):
    x, w = wide(7, 9, 1040), wide(8, 70, 1040)

    assert_same_bits(twin.linear(x, w), contract.bf(twin.linear_f32(x, w)))


def test_the_error_against_float64_is_within_the_budget(twin: Ops):
    # notes: tau = lambda sqrt(K) 2^-24 (|x| |w|), lambda = 6: wrong algorithms exceed it by far
    x, w = normal(9, 16, 2048), normal(10, 64, 2048)
    wide_x, wide_w = (contract.widen(v).astype(np.float64) for v in (x, w))

    error = np.abs(twin.linear_f32(x, w) - wide_x @ wide_w.T)

    budget = 6 * np.sqrt(2048) * 2.0**-24 * (np.abs(wide_x) @ np.abs(wide_w).T)
    assert (error <= budget).all()


def test_order_within_an_aligned_group_of_sixteen_does_not_matter(twin: Ops):
    x, w = wide(11, 4, 576), wide(12, 20, 576)
    order = np.random.default_rng(0).permuted(np.arange(576).reshape(-1, 16), axis=1).ravel()

    shuffled = twin.linear_f32(np.ascontiguousarray(x[:, order]), np.ascontiguousarray(w[:, order]))

    assert_same_bits(shuffled, twin.linear_f32(x, w))


def test_a_power_of_two_passes_through(twin: Ops):
    x, w = normal(13, 4, 1040), normal(14, 20, 1040)
    doubled = to_bf16(contract.widen(x) * 8)

    assert_same_bits(twin.linear_f32(doubled, w), twin.linear_f32(x, w) * np.float32(8))


@pytest.mark.parametrize("bad", [0x7FC0, 0x7F80])
def test_a_nan_or_infinity_stays_in_its_token_and_output(twin: Ops, bad: int):
    x, w = normal(15, 33, 64), normal(16, 70, 64)
    clean = twin.linear(x, w)
    x[7, 5] = bad
    w[66, 9] = bad

    result = twin.linear(x, w)

    rows, columns = np.arange(33) != 7, np.arange(70) != 66
    assert_same_bits(result[rows][:, columns], clean[rows][:, columns])
    assert not np.isfinite(contract.widen(result[7])).any()
    assert not np.isfinite(contract.widen(result[:, 66])).any()


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_the_number_of_threads_does_not_enter_the_bits(
    library: Library, twin: Ops, num_threads: int
):
    x, w = wide(17, 70, 528), wide(18, 200, 528)

    with Ops(library, "cpu", num_threads) as ops:
        result = ops.linear(x, w)

    assert_same_bits(result, twin.linear(x, w))
