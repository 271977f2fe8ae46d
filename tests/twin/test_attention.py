"""Attention: the page's bits, float64's values, and inputs whose answer is known beforehand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bindings import Library
from engine.errors import InvalidArgument
from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits, normal, to_bf16
from tests.twin.paged import Sequence, attend, draw

TILE, SEGMENT = 128, 1024
EDGES = sorted(
    {
        length
        for edge in (1, 2, 16, 32, TILE, 2 * TILE, SEGMENT, SEGMENT + TILE, 2 * SEGMENT)
        for length in (edge - 1, edge, edge + 1)
        if length > 0
    }
)
BLOCK_SIZES = (16, 32, 64, 128)


@pytest.mark.parametrize("seq_len", EDGES)
def test_decode_has_the_contracts_bits_at_every_edge(twin: Ops, seq_len: int):
    sequence = draw(seq_len, seq_len, 1, scale=2)

    assert_same_bits(attend(twin, [sequence], seed=seq_len)[0], sequence.expected())


@pytest.mark.parametrize("seq_len", [1, 17, 33, 65, 129, 257])
def test_prefill_has_the_contracts_bits(twin: Ops, seq_len: int):
    sequence = draw(seq_len, seq_len, seq_len)

    assert_same_bits(attend(twin, [sequence])[0], sequence.expected())


@pytest.mark.parametrize("start", [100, 1020])
def test_a_chunk_over_tile_and_segment_edges_has_the_contracts_bits(twin: Ops, start: int):
    sequence = draw(start, start + 30, 30, scale=2)

    assert_same_bits(attend(twin, [sequence], block_size=32)[0], sequence.expected())


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(2, 2), (3, 1), (9, 3), (8, 2), (8, 1), (32, 1)]
)
def test_every_grouping_of_heads_has_the_contracts_bits(
    twin: Ops, num_heads: int, num_kv_heads: int
):
    sequence = draw(num_heads, 140, 5, num_heads, num_kv_heads, scale=2)

    assert_same_bits(attend(twin, [sequence])[0], sequence.expected())


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 12)), min_size=1, max_size=4),
    st.sampled_from(BLOCK_SIZES),
    st.integers(0, 2**31),
)
def test_any_step_has_the_contracts_bits(
    twin: Ops, lengths: list[tuple[int, int]], block_size: int, seed: int
):
    sequences = [
        draw(seed + 3 * i, seq_len, min(num_new, seq_len), scale=1 + i)
        for i, (seq_len, num_new) in enumerate(lengths)
    ]

    results = attend(twin, sequences, block_size, seed)

    for sequence, result in zip(sequences, results, strict=True):
        assert_same_bits(result, sequence.expected())


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_size_and_placement_do_not_enter_the_bits(twin: Ops, block_size: int):
    sequence = draw(1, 300, 40, 4, 2, scale=2)
    expected = attend(twin, [sequence], 16, seed=0)[0]

    for seed in range(3):
        assert_same_bits(attend(twin, [sequence], block_size, seed)[0], expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_the_number_of_threads_does_not_enter_the_bits(
    library: Library, twin: Ops, num_threads: int
):
    sequences = [draw(1, 300, 70, 6, 2), draw(2, 129, 1, 6, 2)]

    with Ops(library, "cpu", num_threads) as ops:
        results = attend(ops, sequences)

    for result, expected in zip(results, attend(twin, sequences), strict=True):
        assert_same_bits(result, expected)


def test_a_row_is_the_same_alone_and_in_any_company(twin: Ops):
    sequences = [
        draw(10 * i, length, new, 4, 2)
        for i, (length, new) in enumerate([(1, 1), (200, 1), (64, 64), (129, 3), (31, 31)])
    ]
    alone = [attend(twin, [sequence])[0] for sequence in sequences]

    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0]):
        results = attend(twin, [sequences[i] for i in order], seed=len(order))
        for i, result in zip(order, results, strict=True):
            assert_same_bits(result, alone[i])


def test_decode_is_prefill(twin: Ops):
    whole = draw(5, 280, 280, 4, 2, scale=2)
    prefill = attend(twin, [whole])[0]

    for position in (0, 1, 15, 16, 127, 128, 129, 255, 256, 279):
        end = position + 1
        one = Sequence(whole.q[position:end], whole.k[:end], whole.v[:end])
        assert_same_bits(attend(twin, [one], 64)[0], prefill[position:end])


@pytest.mark.parametrize("position", [0, 15, 16, 127, 128, 200])
def test_later_tokens_of_the_cache_are_not_seen(twin: Ops, position: int):
    # queries in the middle: the cache already holds what comes after them
    whole = draw(6, 260, 260)
    changed = Sequence(whole.q, whole.k.copy(), whole.v.copy())
    changed.k[position + 1 :] = normal(99, 260 - position - 1, 1, 64, scale=30)
    changed.v[position + 1 :] = normal(98, 260 - position - 1, 1, 64, scale=30)

    before, after = attend(twin, [whole])[0], attend(twin, [changed])[0]

    assert_same_bits(after[: position + 1], before[: position + 1])
    assert (after[position + 1 :] != before[position + 1 :]).any()


@pytest.mark.parametrize("poison", [0x7FC1, 0xFFFF, 0x7F80, 0xFF80, 0x7149], ids=hex)
@pytest.mark.parametrize("seq_len", [1, 17, 100, 130])
def test_slots_that_hold_no_token_may_hold_anything(twin: Ops, seq_len: int, poison: int):
    # NaN, either infinity, 1e30: in K alone, in V alone, in both
    sequence = draw(7, seq_len, min(3, seq_len), 2, 1)
    clean = attend(twin, [sequence], 128, poison_k=0, poison_v=0)[0]

    for poison_k, poison_v in ((poison, 0), (0, poison), (poison, poison)):
        result = attend(twin, [sequence], 128, poison_k=poison_k, poison_v=poison_v)[0]
        assert_same_bits(result, clean)


@pytest.mark.parametrize("value", [0x7F7F, 0xFF7F, 0x7149], ids=["largest", "smallest", "1e30"])
def test_a_future_value_however_large_leaves_no_trace(twin: Ops, value: int):
    # its product with P = 0 is no term of the step
    whole = draw(22, 140, 140)
    changed = Sequence(whole.q, whole.k, whole.v.copy())
    changed.v[100:] = value

    before, after = attend(twin, [whole])[0], attend(twin, [changed])[0]

    assert_same_bits(after[:100], before[:100])


@pytest.mark.parametrize(
    ("large", "late", "opposite", "expected"),
    [
        # tiles 0 .. 7 are a segment: the ones of tiles 4 .. 7 are lost beside 2^25 within it
        (0, (4, 5, 6, 7), 8, 0.0),
        # tiles 8 .. 15 are the next: -2^25 swallows the one of tile 9 before the row sees either
        (0, (9,), 8, 0.0),
        # the ones of tiles 8 .. 11 come together first, then meet what tile 0 left, then tile 16
        (0, (8, 9, 10, 11), 16, 4.0),
        # one after another inside one segment: 2^25 and its opposite are gone when the one comes
        (0, (2,), 1, 1.0),
    ],
)
def test_tiles_fold_in_their_segment_and_segments_in_their_row(
    twin: Ops, large: int, late: tuple[int, ...], opposite: int, expected: float
):
    # equal scores: every factor is 1, so folding is adding, in the written order, in float32
    seq_len = 17 * TILE
    v = np.zeros((seq_len, 1, 64), np.float32)
    v[large * TILE], v[opposite * TILE] = 2.0**25, -(2.0**25)
    v[[tile * TILE for tile in late]] = 1
    sequence = Sequence(np.zeros((1, 1, 64), np.uint16), normal(23, seq_len, 1, 64), to_bf16(v))

    result = attend(twin, [sequence])[0]

    assert_same_bits(result, sequence.expected())
    assert_same_bits(result, np.full_like(result, to_bf16(np.array([expected / seq_len]))[0]))


def test_a_fold_that_cancels_shows_its_fused_product(twin: Ops):
    # the second tile is the first with V negated and scores a hair lower: what is left of the
    # sum is near the rounding error of a product that is not fused
    sequence = draw(25, 2 * TILE, 1, 8, 1)
    sequence.q[..., 0] = 0x3F80
    sequence.k[:TILE, 0, 0], sequence.k[TILE:, 0, 0] = 0x3F80, 0x3F7F
    sequence.k[TILE:, 0, 1:] = sequence.k[:TILE, 0, 1:]
    sequence.v[TILE:] = sequence.v[:TILE] ^ 0x8000

    assert_same_bits(attend(twin, [sequence])[0], sequence.expected())


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


@pytest.mark.parametrize(("seq_len", "scale"), [(40, 1.0), (200, 3.0), (1100, 1.0), (1300, 3.0)])
def test_the_error_against_float64_is_within_the_budget(twin: Ops, seq_len: int, scale: float):
    sequence = draw(16, seq_len, 4, 2, 1, scale=scale)
    q, k, v = (contract.widen(x).astype(np.float64) for x in (sequence.q, sequence.k, sequence.v))

    result = contract.widen(attend(twin, [sequence])[0])

    for token in range(4):
        keys = slice(0, sequence.start + token + 1)
        for head in range(2):
            score = k[keys, 0] @ q[token, head] / 8
            p = np.exp(score - score.max())
            p /= p.sum()
            truth = p @ v[keys, 0]
            assert (
                np.abs(result[token, head] - truth)
                <= budget(q[token, head], k[keys, 0], v[keys, 0], p, truth)
            ).all()


def budget(q, k, v, p, truth) -> np.ndarray:
    """What rounding P and the result to bf16 and everything else to float32 can cost.

    Half a last place of the result; sixfold the random sum of P's roundings (2^-8 / sqrt 3 each,
    around the result, because the sum in the denominator is that of the rounded P); sixfold the
    error of a score of 64 products times what the row holds, and of the folds of the tiles.
    """
    place = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(truth), 1e-30))) - 7)
    score_error = 6 * math.sqrt(64) * 2.0**-24 * (np.abs(k) @ np.abs(q)).max() / 8
    mass = p @ np.abs(v)
    tiles = math.sqrt(-(-len(k) // TILE))
    spread = np.sqrt((p[:, None] ** 2 * (v - truth) ** 2).sum(0))
    return (
        place / 2 * (1 + 2.0**-7)
        + (2 * score_error + 12 * 2.0**-24 * tiles) * mass
        + 6 * 2.0**-8 / math.sqrt(3) * spread
    )


def test_the_output_lies_between_the_smallest_and_the_largest_value(twin: Ops):
    sequence = draw(17, 200, 10, scale=2)

    result = contract.widen(attend(twin, [sequence])[0])

    v = contract.widen(sequence.v)[:, 0]
    for token in range(10):
        seen = v[: sequence.start + token + 1]
        room = 2.0**-7 * np.abs(seen).max(0)
        assert (result[token, 0] >= seen.min(0) - room).all()
        assert (result[token, 0] <= seen.max(0) + room).all()


@pytest.mark.parametrize("power", [-20, 3, 20])
def test_a_power_of_two_in_v_passes_through(twin: Ops, power: int):
    sequence = draw(18, 300, 4, 2, 1)
    scaled = to_bf16(np.ldexp(contract.widen(sequence.v), power))

    result = attend(twin, [Sequence(sequence.q, sequence.k, scaled)])[0]

    expected = np.ldexp(contract.widen(attend(twin, [sequence])[0]), power)
    assert_same_bits(result, to_bf16(expected))


def test_a_power_of_two_may_move_from_q_to_k(twin: Ops):
    sequence = draw(19, 300, 4, 2, 1)
    q, k = to_bf16(contract.widen(sequence.q) * 2), to_bf16(contract.widen(sequence.k) / 2)

    result = attend(twin, [Sequence(q, k, sequence.v)])[0]

    assert_same_bits(result, attend(twin, [sequence])[0])


def test_repeated_kv_heads_equal_a_group(twin: Ops):
    grouped = draw(20, 150, 5, 8, 2, scale=2)
    expanded = Sequence(
        grouped.q,
        np.ascontiguousarray(np.repeat(grouped.k, 4, 1)),
        np.ascontiguousarray(np.repeat(grouped.v, 4, 1)),
    )

    assert_same_bits(attend(twin, [expanded])[0], attend(twin, [grouped])[0])


def test_v_of_one_value_gives_that_value(twin: Ops):
    sequence = draw(21, 333, 3, scale=3)
    v = np.full_like(sequence.v, to_bf16(np.array([1.3]))[0])

    result = attend(twin, [Sequence(sequence.q, sequence.k, v)])[0]

    assert (np.abs(result.astype(int) - int(v[0, 0, 0])) <= 1).all()


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "num_blocks", "message"),
    [
        (1, 1, 32, 16, 2, "head_dim is 32, must be 64"),
        (1, 0, 64, 16, 2, "num_kv_heads is 0"),
        (3, 2, 64, 16, 2, r"num_heads is 3, must be 1 .. 32 times num_kv_heads \(2\)"),
        (33, 1, 64, 16, 2, "num_heads is 33"),
        (1, 1, 64, 8, 2, "block_size is 8, must be 16, 32, 64 or 128"),
        (1, 1, 64, 48, 2, "block_size is 48"),
        (1, 1, 64, 256, 2, "block_size is 256"),
        (1, 1, 64, 0, 2, "block_size is 0"),
        (1, 1, 64, 16, 0, "num_blocks is 0"),
        (1, 1, 64, 16, 2**27, "num_blocks is"),  # the slots would not fit 32 bits
    ],
)
def test_an_impossible_shape_is_refused(
    twin: Ops, num_heads, num_kv_heads, head_dim, block_size, num_blocks, message
):
    library = twin.library
    batch = library.ffi.new("EngineBatch *")
    memory = [library.ffi.new("uint16_t[64]") for _ in range(4)]

    with pytest.raises(InvalidArgument, match=message):
        library.check(
            library.lib.op_attention(
                twin._context,
                *memory,
                batch,
                num_heads,
                num_kv_heads,
                head_dim,
                block_size,
                num_blocks,
            )
        )
