"""A decode step as it runs, fused where the device has it, against the same step with taps.

Taps need every operation on its own, so the tapped step is the unfused one. On the CPU both are.
"""

from collections.abc import Callable

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Tap, TapPoint
from engine.model_runner import ModelRunner
from tests.system.trace import assert_same_trace, cache_of, tokens
from tests.twin.bits import assert_same_bits

MakeRunner = Callable[..., ModelRunner]


@pytest.mark.parametrize(
    "lengths", [(1,), (16,), (130,), (5, 64, 127), (1, 2, 3, 15, 16, 17, 31, 60)]
)
@pytest.mark.parametrize("name", ["toy", "toy-untied", "toy-gqa3", "toy-gqa8", "toy-wide"])
def test_an_untapped_decode_step_is_the_tapped_one(
    runner_of: MakeRunner, name: str, lengths: tuple[int, ...]
):
    runner = runner_of(name)
    width = 40 // len(lengths)
    tables = [list(range(width * i, width * (i + 1))) for i in range(len(lengths))]
    results = []
    for tapped in (False, True):
        runner.fill_blocks(range(40), 0x7FC0)
        for i, (length, table) in enumerate(zip(lengths, tables, strict=True)):
            runner.forward(build_batch([SequenceSlice(tokens(i, length), 0, table)], 16, "none"))
        ids, trace = [7 + i for i in range(len(lengths))], {}
        for step in range(4):  # greedy, so a wrong token would lead astray for good
            batch = build_batch(
                [
                    SequenceSlice([token], length + step, table)
                    for token, length, table in zip(ids, lengths, tables, strict=True)
                ],
                16,
            )
            taps = [Tap(TapPoint.embed, 0, out=runner.tap_buffer(TapPoint.embed, batch))]
            output = runner.forward(batch, taps if tapped else ())
            trace |= {f"logits {step}": output.logits, f"next_ids {step}": output.next_ids}
            ids = output.next_ids.tolist()
        for i, (length, table) in enumerate(zip(lengths, tables, strict=True)):
            cache = cache_of(runner, length + 4, table)
            trace |= {f"sequence {i} {key}": value for key, value in cache.items()}
        results.append(trace)

    assert_same_trace(*results)


@pytest.mark.parametrize("name", ["toy", "toy-gqa3"])
def test_a_decode_step_beside_a_prefill_is_the_same(runner_of: MakeRunner, name: str):
    runner = runner_of(name)
    tables = [list(range(10)), list(range(10, 20))]
    runner.forward(build_batch([SequenceSlice(tokens(0, 20), 0, tables[0])], 16, "none"))
    decode = SequenceSlice([9], 20, tables[0])

    mixed = runner.forward(build_batch([decode, SequenceSlice(tokens(1, 9), 0, tables[1])], 16))
    alone = runner.forward(build_batch([decode], 16))

    assert_same_bits(alone.logits, mixed.logits[:1])
    assert alone.next_ids[0] == np.argmax(mixed.logits[0])
