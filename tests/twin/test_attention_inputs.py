"""Attention of inputs whose answer is known beforehand."""

import math

import numpy as np
import pytest

from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits, normal, to_bf16
from tests.twin.paged import Sequence, attend, draw


class TestTomography:
    """Where the answer tells which keys were looked at."""

    @pytest.mark.parametrize(
        "seq_len", [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 256, 300, 500]
    )
    @pytest.mark.parametrize("block_size", [16, 128])
    def test_equal_scores_show_each_key_once(self, twin: Ops, seq_len: int, block_size: int):
        # q = 0: P = 1/L; V of 64 keys is one-hot, so the output is that part of the attention row
        q = np.zeros((1, 1, 64), np.uint16)
        k = normal(8, seq_len, 1, 64)
        for first in range(0, seq_len, 64):
            keys = np.arange(first, min(first + 64, seq_len))
            v = np.zeros((seq_len, 1, 64), np.uint16)
            v[keys, 0, keys - first] = to_bf16(np.array([2.0 ** math.ceil(math.log2(seq_len))]))

            row = contract.widen(attend(twin, [Sequence(q, k, v)], block_size)[0])[0, 0]

            share = 2.0 ** math.ceil(math.log2(seq_len)) / seq_len
            seen = np.abs(row[: len(keys)] / share - 1) <= 2.0**-8
            assert seen.all(), f"key {keys[~seen]} of {seq_len}"
            assert (row[len(keys) :] == 0).all()

    @pytest.mark.parametrize("seq_len", [129, 1030])
    @pytest.mark.parametrize("block_size", [16, 64])
    def test_a_needle_is_found_wherever_it_lies(self, twin: Ops, seq_len: int, block_size: int):
        # the query is 4 k_j: P_j is 1 and V_j comes back unchanged
        k, v = normal(9, seq_len, 1, 64, scale=1), normal(10, seq_len, 1, 64)
        edges = [0, 1, block_size - 1, block_size, 127, 128, 1023, 1024, seq_len - 2, seq_len - 1]
        for needle in sorted({e for e in edges if e < seq_len}):
            q = to_bf16(contract.widen(k[needle]) * 4)[None]

            result = attend(twin, [Sequence(q, k, v)], block_size, seed=needle)[0]

            assert_same_bits(result[0], v[needle])

    def test_two_sequences_find_their_own_needles(self, twin: Ops):
        lengths = [1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129]
        sequences = []
        for i, length in enumerate(lengths):
            k, v = normal(i, length, 1, 64), normal(i + 50, length, 1, 64)
            needle = (7 * i) % length
            sequences.append(Sequence(to_bf16(contract.widen(k[needle]) * 4)[None], k, v))

        results = attend(twin, sequences, 16, seed=3)

        for i, (sequence, result) in enumerate(zip(sequences, results, strict=True)):
            assert_same_bits(result[0], sequence.v[(7 * i) % lengths[i]])

    @pytest.mark.parametrize("gap", [0.5, 1.0, 2.0])
    def test_the_log_odds_of_two_keys_measure_the_scale(self, twin: Ops, gap: float):
        # scores gap / 2 and -gap / 2, V = +1 and -1: the output is tanh(gap / 2)
        q, k, v = (np.zeros(shape, np.float32) for shape in ((1, 1, 64), (2, 1, 64), (2, 1, 64)))
        q[0, 0, 5] = 8  # 8 = sqrt(64), so the score is k's value
        k[:, 0, 5] = [gap / 2, -gap / 2]
        v[0], v[1] = 1, -1

        result = contract.widen(attend(twin, [Sequence(*map(to_bf16, (q, k, v)))])[0])

        # two roundings to bf16: of the smaller P and of the result
        assert np.abs(result - math.tanh(gap / 2)).max() <= 2.0**-8

    @pytest.mark.parametrize("kv_head", [0, 1, 2])
    def test_each_group_of_heads_reads_its_own_kv_head(self, twin: Ops, kv_head: int):
        q = normal(11, 1, 9, 64)
        k, v = normal(12, 40, 3, 64), np.zeros((40, 3, 64), np.uint16)
        v[:, kv_head] = 0x3F80

        result = attend(twin, [Sequence(q, k, v)])[0][0]

        heads = np.arange(9) // 3 == kv_head
        assert (np.abs(contract.widen(result[heads]) - 1) <= 2.0**-7).all()
        assert not result[~heads].any()


def test_all_scores_far_below_zero_are_as_good_as_any(twin: Ops):
    # -1500 each: a maximum that starts at 0 would lose every key
    q, k = np.zeros((1, 1, 64), np.float32), np.zeros((200, 1, 64), np.float32)
    q[..., 0], k[..., 0] = 100, -120
    sequence = Sequence(to_bf16(q), to_bf16(k), normal(13, 200, 1, 64))

    result = attend(twin, [sequence])[0]

    assert_same_bits(result, sequence.expected())
    mean = contract.widen(sequence.v).mean(0)
    assert np.abs(contract.widen(result[0]) - mean).max() <= 2.0**-8


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_close_together_have_the_contracts_bits(twin: Ops, sign: int):
    # scores of about 2000 that differ by a few: where scale and maximum meet in one rounding or two
    sequence = draw(24, 500, 4, 4, 1, scale=0.2)
    sequence.q[..., 0] = to_bf16(np.array([180.0]))[0]
    sequence.k[..., 0] = to_bf16(np.array([sign * 96.0]))[0]

    assert_same_bits(attend(twin, [sequence])[0], sequence.expected())


@pytest.mark.parametrize("late", [127, 128, 200, 1024, 1100])
def test_a_late_maximum_rescales_what_came_before(twin: Ops, late: int):
    sequence = draw(14, late + 1, 1)
    direction = contract.widen(sequence.q[0])
    sequence.k[late] = to_bf16(direction * 0.5)  # beats the others, but not beyond their sight

    assert_same_bits(attend(twin, [sequence])[0], sequence.expected())


@pytest.mark.parametrize("early", [0, 100])
def test_an_early_maximum_makes_later_tiles_vanish_without_a_nan(twin: Ops, early: int):
    sequence = draw(15, 1200, 1, scale=1)
    sequence.k[early] = to_bf16(contract.widen(sequence.q[0]) * 100)

    result = attend(twin, [sequence])[0]

    assert_same_bits(result, sequence.expected())
    assert_same_bits(result[0], sequence.v[early])
