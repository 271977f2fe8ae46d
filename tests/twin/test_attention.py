"""Attention: the page's bits, whatever the step looks like, and what is refused.

Inputs whose answer is known beforehand are in test_attention_inputs, float64's values and the
relations of results in test_attention_relations.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bindings import Library
from engine.errors import InvalidArgument
from engine.ops import Ops
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
