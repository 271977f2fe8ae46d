"""Logits of few rows: beyond its keys and values, the last layer is computed for those rows alone.

Against the same step with every row wanted, which computes them all, and against the tapped one.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.batch import Batch, SequenceSlice, build_batch
from engine.bindings import Library, Tap, TapPoint
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from tests.runtime.wrapped_twin import build_wrapped_twin
from tests.system.trace import assert_same_trace, cache_of, tokens
from tests.twin.bits import assert_same_bits

MakeRunner = Callable[..., ModelRunner]
NAN = 0x7FC0
MOST_TOLD = 16  # rows that runtime/index.c tells as a batch of their own


def step(lengths: list[tuple[int, int]], block_size: int = 16) -> tuple[Batch, list[list[int]]]:
    """Sequences of (tokens before, new tokens), every row wanted; and their block tables."""
    order = np.random.default_rng(len(lengths)).permutation(40).tolist()
    tables, slices = [], []
    for i, (before, new) in enumerate(lengths):
        num_blocks = -(-(before + new) // block_size)
        tables.append([order.pop() for _ in range(num_blocks)])
        slices.append(SequenceSlice(tokens(i, before + new)[before:], before, tables[-1]))
    return build_batch(slices, block_size, "all"), tables


def wanting(batch: Batch, rows: list[int]) -> Batch:
    return Batch(**{**vars(batch), "logits_indices": np.asarray(rows, np.int32)})


def fill(runner: ModelRunner, lengths: list[tuple[int, int]], tables: list[list[int]]) -> None:
    """The tokens before the step, in memory that held NaN."""
    runner.fill_blocks(range(40), NAN)
    for i, ((before, _), table) in enumerate(zip(lengths, tables, strict=True)):
        if before:
            part = SequenceSlice(tokens(i, before), 0, table)
            runner.forward(build_batch([part], 16, "none"))


@pytest.mark.parametrize("name", ["toy", "toy-untied", "toy-mha", "toy-gqa3", "toy-wide"])
@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([(0, 2)], [1]),
        ([(0, 40)], [39]),
        ([(0, 150)], [0, 17, 128, 149]),
        ([(130, 50)], [49]),
        ([(0, 70), (5, 1), (0, 33)], [69, 70, 103]),
        ([(20, 40), (0, 3)], [0, 38, 41]),
    ],
    ids=str,
)
def test_wanted_rows_are_those_of_a_step_in_which_all_are(
    runner_of: MakeRunner, name: str, lengths: list[tuple[int, int]], rows: list[int]
):
    runner = runner_of(name)
    batch, tables = step(lengths)
    fill(runner, lengths, tables)
    every = runner.forward(batch)
    ends = [before + new for before, new in lengths]
    caches = [cache_of(runner, end, table) for end, table in zip(ends, tables, strict=True)]
    fill(runner, lengths, tables)

    some = runner.forward(wanting(batch, rows))

    assert_same_bits(some.logits, every.logits[rows])
    assert (some.next_ids == every.next_ids[rows]).all()
    for end, table, cache in zip(ends, tables, caches, strict=True):
        assert_same_trace(cache_of(runner, end, table), cache)


@given(st.data())
@example(None)
@settings(max_examples=40)
def test_any_rows_of_any_step_are_those_of_the_tapped_step(make_runner: MakeRunner, data):
    runner = make_runner("toy")
    if data is None:  # one more row than is told
        lengths, rows = [(0, 40)], list(range(MOST_TOLD + 1))
    else:
        part = st.tuples(st.integers(0, 40), st.integers(1, 24))
        lengths = data.draw(st.lists(part, min_size=1, max_size=5))
        num_tokens = sum(new for _, new in lengths)
        rows = sorted(data.draw(st.sets(st.integers(0, num_tokens - 1), max_size=20)))
    batch, tables = step(lengths)
    batch = wanting(batch, rows)
    fill(runner, lengths, tables)
    tap = Tap(TapPoint.embed, 0, out=runner.tap_buffer(TapPoint.embed, batch))
    tapped = runner.forward(batch, [tap])
    fill(runner, lengths, tables)

    assert_same_bits(runner.forward(batch).logits, tapped.logits)


def test_a_step_without_wanted_rows_fills_the_cache(runner_of: MakeRunner):
    runner = runner_of("toy")
    lengths = [(0, 64)]
    batch, tables = step(lengths)
    fill(runner, lengths, tables)
    runner.forward(batch)
    cache = cache_of(runner, 64, tables[0])
    fill(runner, lengths, tables)

    assert runner.forward(wanting(batch, [])).logits.shape[0] == 0

    assert_same_trace(cache_of(runner, 64, tables[0]), cache)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counting") / "libcounting.so"
    build_wrapped_twin(path, "count_mlp_rows.c", ["twin_kernels"])
    return path


@pytest.mark.parametrize("num_rows", [0, 1, 3, MOST_TOLD, MOST_TOLD + 1])
def test_the_last_layer_computes_no_other_rows(counting: Path, num_rows: int):
    room = EngineConfig(
        "cpu", num_blocks=40, max_seq_len=64, max_num_tokens=64, max_num_seqs=2, block_size=16
    )
    batch, _ = step([(0, 40)])
    counter = ctypes.CDLL(str(counting))
    with ModelRunner(resolve("toy"), room, Library(counting)) as runner:
        size, layers = runner.config.intermediate_size, runner.config.num_layers
        counter.count_mlp_values()

        runner.forward(wanting(batch, list(range(num_rows))))

    last = num_rows if num_rows <= MOST_TOLD else 40
    assert counter.count_mlp_values() == ((layers - 1) * 40 + last) * size


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("overlaps") / "liboverlaps.so"
    build_wrapped_twin(path, "count_row_overlaps.c", ["twin_kernels"])
    return path


@pytest.mark.parametrize("name", ["toy", "toy-gqa3", "toy-gqa8"])
@pytest.mark.parametrize("num_decoding", [0, 5, 14])
def test_no_row_is_gathered_onto_one_that_is_still_read(
    watching: Path, name: str, num_decoding: int
):
    lengths = [(0, 1)] * num_decoding + [(0, 2)]
    room = EngineConfig(  # for this step and no larger one
        "cpu",
        num_blocks=40,
        max_seq_len=64,
        max_num_tokens=num_decoding + 2,
        max_num_seqs=num_decoding + 1,
        block_size=16,
    )
    batch, _ = step(lengths)
    rows = [*range(num_decoding), num_decoding + 1]

    with ModelRunner(resolve(name), room, Library(watching)) as runner:
        runner.forward(wanting(batch, rows))

    assert ctypes.CDLL(str(watching)).count_row_overlaps() == 0
