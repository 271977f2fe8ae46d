"""The same step again and again, poison beside it: the same bits, a thousand times."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from engine.bindings import Library
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops
from engine.sources import shape
from tests.kernels.inputs import assert_same_bits
from tests.kernels.sequences import Sequences

pytestmark = pytest.mark.gpu

REPEATS = 1000
BATCHES = (1, 8, 32, 128)  # one launch for all of a step up to eight; a graph per bucket beyond
BUCKETS = (9, 33, 65, 129)  # the fewest sequences of each graph
PROMPT = 300
PREFILL = BATCHES[-1]  # the sequence whose prompt is still to come


def room(max_num_seqs: int) -> EngineConfig:
    return EngineConfig(
        device="cuda",
        num_threads=0,
        block_size=32,
        num_blocks=2200,
        max_seq_len=512,
        max_num_tokens=512,
        max_num_seqs=max_num_seqs,
    )


def random_lengths(count: int) -> list[int]:
    return np.random.default_rng(count).integers(1, 200, count).tolist()


@pytest.fixture(scope="module", params=["toy-wide", shape.NAME])
def sequences(request: pytest.FixtureRequest, library: Library, gpu: Ops) -> Iterator[Sequences]:
    with ModelRunner(resolve(request.param), room(max(BATCHES)), library) as runner:
        yield Sequences(runner, [*random_lengths(max(BATCHES)), 0], PROMPT)


@pytest.mark.parametrize("num_seqs", BATCHES)
def test_a_thousand_decode_steps_give_the_same_bits(sequences: Sequences, num_seqs: int):
    # Steps of a call feed each other: a bit that differs in any of them changes the last logits.
    engine, batch = sequences.runner.engine, sequences.decode_step(range(num_seqs))
    steps = 1 if sequences.runner.config.vocab_size < 1000 else 8  # logits of 65 MB a call
    expected, found = (
        np.empty((num_seqs, sequences.runner.config.vocab_size), np.float32) for _ in range(2)
    )
    ids = engine.decode(batch, steps, expected)

    for _ in range(REPEATS // steps):
        assert (engine.decode(batch, steps, found) == ids).all()
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))

    assert np.isfinite(expected).all()


def test_a_thousand_prefills_give_the_same_bits(sequences: Sequences):
    runner, batch = sequences.runner, sequences.step([PREFILL], [PROMPT], "last")
    first = runner.forward(batch)
    cached = runner.read_kv(runner.config.num_layers - 1, batch.slot_mapping)

    for _ in range(REPEATS):
        again = runner.forward(batch)
        assert np.array_equal(again.logits.view(np.uint32), first.logits.view(np.uint32))

    assert np.isfinite(first.logits).all()
    last = runner.read_kv(runner.config.num_layers - 1, batch.slot_mapping)
    for found, expected in zip(last, cached, strict=True):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("num_seqs", BUCKETS)
def test_a_step_launched_recorded_and_replayed_gives_the_same_bits(
    library: Library, gpu: Ops, num_seqs: int
):
    results = []
    for enforce_eager in (False, True):  # with graphs: launched, recorded, replayed; without: never
        config = replace(room(256), enforce_eager=enforce_eager)
        with ModelRunner(resolve("toy-gqa3"), config, library) as runner:
            batch = Sequences(runner, random_lengths(num_seqs), 1).decode_step(range(num_seqs))
            results += [runner.forward(batch).logits for _ in range(3)]

    for result in results[1:]:
        assert_same_bits(result, results[0])
