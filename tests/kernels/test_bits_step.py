"""Whole steps of any number of tokens: logits, tokens and cache are the twin's, to the bit.

From some tokens on a step takes the fused operations, which only whole steps reach.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from engine.bindings import Library
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops
from tests.kernels.inputs import NUM_TOKENS, assert_same_bits
from tests.kernels.sequences import Sequences

pytestmark = pytest.mark.gpu

PASTS = (64, 0, 129, 1, 0, 200)  # tokens of each sequence that are cached before the step
LATE = 2  # the sequence that takes what the others leave of a step
NAN = 0x7FC1


@pytest.fixture(scope="module", params=["toy-gqa4", "toy-wide", "toy-gqa3"])
def both(request: pytest.FixtureRequest, library: Library, gpu: Ops) -> Iterator[list[Sequences]]:
    """The same sequences on the GPU and on the twin."""
    runners = []
    for device in ("cuda", "cpu"):
        most = max(NUM_TOKENS) + max(PASTS)
        room = EngineConfig(
            device=device,
            block_size=64,
            num_blocks=len(PASTS) * -(-most // 64) + 9,
            max_seq_len=most,
            max_num_tokens=max(NUM_TOKENS),
            max_num_seqs=len(PASTS),
        )
        runners.append(ModelRunner(resolve(request.param), room, library))
    yield [Sequences(runner, PASTS, max(NUM_TOKENS)) for runner in runners]
    for runner in runners:
        runner.close()


def counts_of(num_tokens: int) -> list[int]:
    """The step's tokens, dealt to the sequences: few to most, the rest to one."""
    few = [1 if num_tokens >= 16 else 0] * len(PASTS)
    if num_tokens >= 256:
        few = [33, 1, 0, 64, 17, 5]
    few[LATE] = num_tokens - sum(few) + few[LATE]
    return few


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_a_step_of_any_number_of_tokens_gives_the_twins_bits(
    both: list[Sequences], num_tokens: int
):
    counts = counts_of(num_tokens)
    rows = [i for i, count in enumerate(counts) if count]
    batch = both[0].step(rows, [counts[i] for i in rows])
    assert len(batch.input_ids) == num_tokens == len(batch.logits_indices)

    gpu, twin = (each.runner.forward(batch) for each in both)

    assert_same_bits(gpu.logits, twin.logits)
    assert gpu.next_ids.tolist() == twin.next_ids.tolist()
    for layer in range(both[0].runner.config.num_layers):
        caches = (each.runner.read_kv(layer, batch.slot_mapping) for each in both)
        for got, expected in zip(*caches, strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("count", [1, 5, 40], ids=["decode", "few", "many"])
def test_a_sequence_whose_past_is_nan_leaves_its_neighbours_bits_alone(
    both: list[Sequences], count: int
):
    rows, runner = [0, 2, 5, 3], both[0].runner
    batch = both[0].step(rows, [count] * len(rows))
    clean = runner.forward(batch).logits.reshape(len(rows), count, -1)

    runner.fill_blocks(both[0].tables[LATE][:1], NAN)
    spoilt = runner.forward(batch).logits.reshape(len(rows), count, -1)

    assert np.isnan(spoilt[1]).all()
    assert_same_bits(np.delete(spoilt, 1, 0), np.delete(clean, 1, 0))
