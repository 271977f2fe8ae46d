"""Decode steps of many sequences at the sizes of real models: the twin's bits.

The toys' reductions have two chunks at most; with more, other instances of the kernels serve.
Cached keys are a constant, so that nothing needs a prefill.
"""

from pathlib import Path

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
from verification.sanitizers.workload import LONG_SUMS, long_sums_directory

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

NUM_SEQS = (9, 33, 70, 130)  # each bucket of sequences
MOST_KEYS = 300
ONE = 0x3F80


def directory_of(name: str) -> Path:
    return resolve(name) if name == shape.NAME else long_sums_directory(name)


@pytest.mark.parametrize("name", [*LONG_SUMS, shape.NAME])
def test_a_step_of_many_sequences_gives_the_twins_bits(library: Library, gpu: Ops, name: str):
    most = max(NUM_SEQS)
    lengths = np.random.default_rng(most).integers(0, MOST_KEYS, most).tolist()
    results = []
    for device in ("cuda", "cpu"):
        room = EngineConfig(
            device=device,
            block_size=64,
            num_blocks=most * 6,
            max_seq_len=512,
            max_num_tokens=most,
            max_num_seqs=most,
        )
        with ModelRunner(directory_of(name), room, library) as runner:
            sequences = Sequences(runner, lengths, growth=1, cached=ONE)
            steps = []
            for num_seqs in NUM_SEQS:
                batch = sequences.decode_step(range(most - num_seqs, most))
                output = runner.forward(batch)
                steps += [output.logits, output.next_ids, *runner.read_kv(0, batch.slot_mapping)]
            results.append(steps)

    for found, expected in zip(*results, strict=True):
        assert_same_bits(found, expected)
