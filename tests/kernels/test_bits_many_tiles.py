"""More tiles than thread blocks, so that a block goes from one to the next: the twin's bits.

The toys' layers have fewer tiles than the card has multiprocessors: each block computes one and
leaves. Here gate, up and the LM head have several for each, and down has 32 chunks, one short.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from engine.batch import Batch
from engine.bindings import Library
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import cache_root
from engine.ops import Ops
from engine.sources.shape import resolve_random
from engine.sources.toy import CONFIGS
from tests.kernels.inputs import assert_same_bits
from tests.kernels.sequences import Sequences

pytestmark = pytest.mark.gpu

WIDE = replace(CONFIGS["toy"], num_layers=1, intermediate_size=16_320, vocab_size=40_000)
NUM_SEQS = (1, 8, 9, 33, 70, 130)  # one launch for all of a step; each bucket of many sequences
PROMPT = 150
ONE = 0x3F80


@pytest.fixture(scope="module")
def both(library: Library, gpu: Ops) -> Iterator[list[Sequences]]:
    """The same sequences on the GPU and on the twin; the last one's prompt is still to come."""
    directory = resolve_random("many-tiles", WIDE, cache_root(), lambda what, done, total: None)
    most = max(NUM_SEQS)
    lengths = [*np.random.default_rng(most).integers(1, 60, most).tolist(), 0]
    runners = []
    for device in ("cuda", "cpu"):
        room = EngineConfig(
            device=device,
            block_size=64,
            num_blocks=4 * (most + 1),
            max_seq_len=256,
            max_num_tokens=PROMPT,
            max_num_seqs=most + 1,
        )
        runners.append(ModelRunner(directory, room, library))
    yield [Sequences(runner, lengths, growth=PROMPT, cached=ONE) for runner in runners]
    for runner in runners:
        runner.close()


def assert_same_step(both: list[Sequences], batch: Batch) -> None:
    found, expected = (each.runner.forward(batch) for each in both)
    assert_same_bits(found.logits, expected.logits)
    assert found.next_ids.tolist() == expected.next_ids.tolist()


@pytest.mark.parametrize("num_seqs", NUM_SEQS)
def test_a_decode_step_of_many_tiles_gives_the_twins_bits(both: list[Sequences], num_seqs: int):
    assert_same_step(both, both[0].decode_step(range(num_seqs)))


def test_a_prefill_of_many_tiles_gives_the_twins_bits(both: list[Sequences]):
    assert_same_step(both, both[0].step([max(NUM_SEQS)], [PROMPT], "last"))
