"""A step of many tokens as it runs, fused where the device has it, against the same step with taps.

Taps need every operation on its own, so the tapped step is the unfused one. On the CPU both are.
"""

from collections.abc import Callable

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.model_runner import ModelRunner
from tests.system.trace import assert_same_trace, cache_of, run, tokens
from tests.twin.bits import assert_same_bits

MakeRunner = Callable[..., ModelRunner]
NAN = 0x7FC0


@pytest.mark.parametrize("length", [33, 64, 129, 257, 385])
@pytest.mark.parametrize(
    "name", ["toy", "toy-untied", "toy-mha", "toy-gqa3", "toy-gqa8", "toy-wide"]
)
def test_an_untapped_prefill_is_the_tapped_one(runner_of: MakeRunner, name: str, length: int):
    runner = runner_of(name)
    table = [int(block) for block in np.random.default_rng(length).permutation(40)[:30]]
    traces = []
    for tapped in (True, False):
        runner.fill_blocks(range(40), NAN)
        traces.append(run(runner, tokens(length, length), [length], table, tapped))

    assert_same_trace(traces[1], {key: traces[0][key] for key in traces[1]})


@pytest.mark.parametrize("cuts", [[64, 33, 160], [1, 40, 216], [200, 57]], ids=str)
def test_an_untapped_prefill_in_chunks_is_the_whole_one(runner_of: MakeRunner, cuts: list[int]):
    runner = runner_of("toy-gqa4")
    text, table = tokens(5, sum(cuts)), list(range(20))

    whole = run(runner, text, [len(text)], table, tapped=False)

    assert_same_trace(run(runner, text, cuts, table, tapped=False), whole)


@pytest.mark.parametrize("name", ["toy", "toy-gqa3"])
def test_sequences_in_one_untapped_step_are_those_alone(runner_of: MakeRunner, name: str):
    runner = runner_of(name)
    lengths, tables = (70, 1, 90, 33), [list(range(10 * i, 10 * i + 10)) for i in range(4)]
    slices = [
        SequenceSlice(tokens(i, length), 0, table)
        for i, (length, table) in enumerate(zip(lengths, tables, strict=True))
    ]

    together = runner.forward(build_batch(slices, 16))
    caches = [cache_of(runner, length, t) for length, t in zip(lengths, tables, strict=True)]

    for i, (part, length, table) in enumerate(zip(slices, lengths, tables, strict=True)):
        runner.fill_blocks(range(40), NAN)
        alone = runner.forward(build_batch([part], 16))
        assert_same_bits(alone.logits[0], together.logits[i])
        assert_same_trace(cache_of(runner, length, table), caches[i])
