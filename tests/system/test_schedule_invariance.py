"""What a step contains does not enter its bits: chunks, mates, blocks, threads, poison, taps.

On every device that is there: what a GPU computes is held to what it computes itself.
"""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Tap, TapPoint
from engine.model_runner import ModelRunner
from tests.system.trace import (
    ONCE,
    Trace,
    assert_same_trace,
    cache_of,
    every_tap,
    rows,
    run,
    tokens,
)
from tests.twin.bits import assert_same_bits

MakeRunner = Callable[..., ModelRunner]
TOYS = (
    "toy",
    "toy-untied",
    "toy-mha",
    "toy-gqa3",
    "toy-gqa4",
    "toy-gqa8",
    "toy-plain-rope",
    "toy-wide",
)
LENGTH = 150  # over one attention tile
TEXT = tokens(0, LENGTH)
TABLE = list(range(20))


@pytest.fixture(scope="module")
def whole(runner_of: MakeRunner) -> Trace:
    return run(runner_of(), TEXT, [LENGTH], TABLE)


@pytest.mark.parametrize("name", TOYS)
def test_decode_is_prefill_at_every_tap(runner_of: MakeRunner, name: str):
    runner = runner_of(name)
    text = tokens(1, 20)
    prefill = run(runner, text, [20], TABLE)

    assert_same_trace(run(runner, text, [1] * 20, TABLE), prefill)


def test_decode_is_prefill_over_a_tile_edge(runner_of: MakeRunner, whole: Trace):
    decode = run(runner_of(), TEXT, [120] + [1] * 30, TABLE)

    assert_same_trace(decode, whole)


@st.composite
def cuts(draw: st.DrawFn, total: int) -> list[int]:
    borders = draw(st.sets(st.integers(1, total - 1), max_size=6))
    edges = [0, *sorted(borders), total]
    return [end - start for start, end in zip(edges, edges[1:], strict=False)]


@settings(max_examples=15)
@given(cuts(LENGTH))
def test_any_chunks_are_one_prefill(runner_of: MakeRunner, whole: Trace, pieces: list[int]):
    assert_same_trace(run(runner_of(), TEXT, pieces, TABLE), whole)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("seed", range(3))
def test_block_size_and_permutation_do_not_matter(
    runner_of: MakeRunner, whole: Trace, block_size: int, seed: int
):
    runner = runner_of(block_size=block_size)
    table = [int(x) for x in np.random.default_rng(seed).permutation(40)[:10]]

    assert_same_trace(run(runner, TEXT, [100, 50], table), whole)


@pytest.mark.parametrize("pool", [10, 11, 300])
def test_the_size_of_the_pool_does_not_matter(runner_of: MakeRunner, whole: Trace, pool: int):
    runner = runner_of(num_blocks=pool)

    assert_same_trace(run(runner, TEXT, [LENGTH], [pool - 1 - i for i in range(10)]), whole)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_the_number_of_threads_does_not_matter(
    runner_of: MakeRunner, whole: Trace, num_threads: int
):
    runner = runner_of(num_threads=num_threads)

    assert_same_trace(run(runner, TEXT, [149, 1], TABLE), whole)


# Section 4: a slot that holds no token counts as zero, so not only patterns that 0 * x forgives.
@pytest.mark.parametrize("poison", [0x7FC1, 0x7F80, 0xFF80, 0x7149], ids=hex)
def test_memory_that_nobody_owns_may_hold_anything(
    runner_of: MakeRunner, whole: Trace, poison: int
):
    runner = runner_of()
    runner.fill_blocks(range(40), poison)

    assert_same_trace(run(runner, TEXT, [100, 49, 1], TABLE), whole)


def test_what_an_earlier_sequence_left_in_the_blocks_is_not_seen(
    runner_of: MakeRunner, whole: Trace
):
    runner = runner_of()
    run(runner, tokens(77, 320), [320], TABLE, tapped=False)

    assert_same_trace(run(runner, TEXT, [LENGTH], TABLE), whole)


def test_the_same_run_again_gives_the_same_bits(runner_of: MakeRunner, whole: Trace):
    for _ in range(5):
        assert_same_trace(run(runner_of(), TEXT, [LENGTH], TABLE), whole)


def test_untapped_is_tapped(runner_of: MakeRunner, whole: Trace):
    untapped = run(runner_of(), TEXT, [LENGTH], TABLE, tapped=False)

    assert_same_trace(untapped, {name: whole[name] for name in untapped})


@pytest.mark.parametrize(
    "point", [p for p in TapPoint if p != TapPoint.logits], ids=lambda p: p.name
)
def test_a_value_forced_to_itself_changes_nothing(
    runner_of: MakeRunner, whole: Trace, point: TapPoint
):
    runner = runner_of()
    batch = build_batch([SequenceSlice(TEXT, 0, TABLE)], 16, "all")
    layers = range(1 if point in ONCE else 2)
    taps = [Tap(point, i, force=whole[f"{point.name} {i}"].copy()) for i in layers]

    output = runner.forward(batch, taps)

    assert_same_bits(output.logits, whole["logits"])


@pytest.mark.parametrize(
    ("point", "layer"),
    [
        (p, layer)
        for p in TapPoint
        for layer in (0, 1)
        if p != TapPoint.logits and not (layer and p in ONCE)
    ],
    ids=lambda x: x.name if isinstance(x, TapPoint) else str(x),
)
def test_a_forced_value_is_used_downstream_and_nowhere_upstream(
    runner_of: MakeRunner, point: TapPoint, layer: int
):
    runner = runner_of()
    text = TEXT[:20]
    plain = run(runner, text, [20], TABLE)
    batch = build_batch([SequenceSlice(text, 0, TABLE)], 16, "all")
    points = every_tap(runner)
    at = f"{point.name} {layer}"
    forced = plain[at].copy()
    forced[7] ^= 0x0040  # the leading bit of every significand of token 7
    taps = [
        Tap(p, i, out=runner.tap_buffer(p, batch), force=forced if f"{p.name} {i}" == at else None)
        for p, i in points
    ]

    logits = runner.forward(batch, taps).logits

    result = {f"{tap.point.name} {tap.layer}": tap.out for tap in taps}
    order = {
        f"{p.name} {i}": (-1 if p is TapPoint.embed else i + 99 * (p is TapPoint.final_norm), p)
        for p, i in points
    }
    for name, place in order.items():
        if place <= order[at]:  # `out` shows what was computed, before it was replaced
            assert_same_bits(result[name], plain[name])
    assert_same_bits(logits[:7], plain["logits"][:7])
    assert (logits[7] != plain["logits"][7]).any()


LENGTHS = (1, 2, 17, 40, 100)  # of the sequences that share steps


@pytest.fixture(scope="module")
def alone(runner_of: MakeRunner) -> list[Trace]:
    runner = runner_of()
    return [run(runner, tokens(i, length), [length], TABLE) for i, length in enumerate(LENGTHS)]


class TestBatches:
    """A sequence's values are its own, whoever shares the step."""

    def together(
        self, runner: ModelRunner, order: list[int], parts: list[tuple[int, int]]
    ) -> list[Trace]:
        """Rows parts[i] of sequence order[i], in one step, each on blocks of its own."""
        slices, tables = [], []
        for place, (which, (start, end)) in enumerate(zip(order, parts, strict=True)):
            tables.append([8 * place + i for i in (3, 0, 7, 1, 2, 6, 5, 4)])
            text = tokens(which, LENGTHS[which])
            slices.append(SequenceSlice(text[start:end], start, tables[-1]))
        batch = build_batch(slices, 16, "all")
        taps = [Tap(p, i, out=runner.tap_buffer(p, batch)) for p, i in every_tap(runner)]
        output = runner.forward(batch, taps)
        step = {f"{tap.point.name} {tap.layer}": tap.out for tap in taps}
        step |= {"logits": output.logits, "next_ids": output.next_ids}
        results = []
        for table, first, last, (start, end) in zip(
            tables, batch.cu_seqlens_q, batch.cu_seqlens_q[1:], parts, strict=False
        ):
            cache = rows(cache_of(runner, end, table), start, end)
            results.append(rows(step, first, last) | cache)
        return results

    @pytest.mark.parametrize(
        "order",
        [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 2, 2, 2, 2], [3, 0], [1, 4, 0]],
        ids=lambda order: "".join(map(str, order)),
    )
    def test_a_prefill_is_the_same_in_any_company(
        self, runner_of: MakeRunner, alone: list[Trace], order: list[int]
    ):
        parts = [(0, LENGTHS[which]) for which in order]

        results = self.together(runner_of(), order, parts)

        for which, result in zip(order, results, strict=True):
            assert_same_trace(result, alone[which])

    @settings(max_examples=10)
    @given(st.permutations(range(5)), st.lists(st.integers(1, 99), min_size=5, max_size=5))
    def test_prefill_and_decode_may_ride_in_one_step(
        self, runner_of: MakeRunner, alone: list[Trace], order: list[int], borders: list[int]
    ):
        runner = runner_of()
        borders = [min(b, LENGTHS[which] - 1) for b, which in zip(borders, order, strict=True)]
        begun = [i for i, border in enumerate(borders) if border]
        for place in begun:  # the first parts one by one, on the blocks that the step will name
            table = [8 * place + i for i in (3, 0, 7, 1, 2, 6, 5, 4)]
            text = tokens(order[place], LENGTHS[order[place]])[: borders[place]]
            run(runner, text, [len(text)], table, tapped=False)

        parts = [(b, LENGTHS[which]) for b, which in zip(borders, order, strict=True)]
        results = self.together(runner, order, parts)

        for which, (start, end), result in zip(order, parts, results, strict=True):
            assert_same_trace(result, rows(alone[which], start, end))

    def test_a_nan_in_one_sequence_stays_there(self, runner_of: MakeRunner, alone: list[Trace]):
        runner = runner_of()
        slices = [
            SequenceSlice(tokens(i, n), 0, [8 * i + j for j in range(8)])
            for i, n in enumerate(LENGTHS)
        ]
        batch = build_batch(slices, 16, "last")
        embed = np.concatenate([trace["embed 0"] for trace in alone])
        embed[batch.cu_seqlens_q[2] : batch.cu_seqlens_q[3]] = 0x7FC0  # all of sequence 2

        logits = runner.forward(batch, [Tap(TapPoint.embed, 0, force=embed)]).logits

        for i in (0, 1, 3, 4):
            assert_same_bits(logits[i], alone[i]["logits"][-1])
        assert np.isnan(logits[2]).all()


@pytest.mark.parametrize("changed", [1, 16, 100, 127, 128, 149])
def test_future_tokens_do_not_change_past_rows(runner_of: MakeRunner, whole: Trace, changed: int):
    text = TEXT[:changed] + [(x + 1) % 256 for x in TEXT[changed:]]

    result = run(runner_of(), text, [LENGTH], TABLE)

    assert_same_trace(rows(result, 0, changed), rows(whole, 0, changed))
    assert (result["logits"][changed] != whole["logits"][changed]).any()


def test_the_wanted_rows_are_those_of_all_rows(runner_of: MakeRunner, whole: Trace):
    runner = runner_of()
    slices = [SequenceSlice(TEXT, 0, TABLE)]
    for indices in ([0], [149], [3, 77, 149], list(range(0, 150, 2)), []):
        batch = build_batch(slices, 16, "none")
        batch = type(batch)(**{**vars(batch), "logits_indices": np.array(indices, np.int32)})

        output = runner.forward(batch)

        assert_same_bits(output.logits, whole["logits"][indices])
        assert output.next_ids.tolist() == whole["next_ids"][indices].tolist()


def test_next_ids_are_the_arg_max_of_the_logits(whole: Trace):
    assert (whole["next_ids"] == whole["logits"].argmax(-1)).all()


@pytest.mark.parametrize(
    "room", [{"max_num_seqs": 1}, {"max_num_tokens": 150}, {"max_seq_len": 320}]
)
def test_an_engine_with_less_room_gives_the_same_bits(
    runner_of: MakeRunner, whole: Trace, room: dict[str, int]
):
    assert_same_trace(run(runner_of(**room), TEXT, [LENGTH], TABLE), whole)


def test_forked_sequences_share_blocks_and_stay_apart(runner_of: MakeRunner):
    # 32 common tokens in blocks 0 and 1; each goes on in a block of its own, in the same step
    runner = runner_of()
    common, ends = tokens(5, 32), [tokens(6, 9), tokens(7, 9)]
    expected = [run(runner, common + end, [41], [10, 11, 12]) for end in ends]
    run(runner, common, [32], [0, 1], tapped=False)

    slices = [
        SequenceSlice(end, 32, [0, 1, block]) for end, block in zip(ends, (2, 3), strict=True)
    ]
    logits = runner.forward(build_batch(slices, 16, "all")).logits

    assert_same_bits(logits[:9], expected[0]["logits"][32:])
    assert_same_bits(logits[9:], expected[1]["logits"][32:])
