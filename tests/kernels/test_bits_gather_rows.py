"""The rows whose logits are wanted: the GPU picks those that the twin picks."""

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Library
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 16
LENGTHS = (5, 33, 1, 17)


def test_the_last_row_of_each_of_several_prompts_is_the_twins(library: Library, gpu: Ops):
    room = {"block_size": BLOCK_SIZE, "num_blocks": 8, "max_seq_len": 64, "max_num_tokens": 64}
    random, blocks = np.random.default_rng(1), iter((3, 7, 0, 5, 1, 6, 2, 4))
    batch = build_batch(
        [
            SequenceSlice(
                random.integers(0, 250, length).tolist(),
                0,
                [next(blocks) for _ in range(-(-length // BLOCK_SIZE))],
            )
            for length in LENGTHS
        ],
        BLOCK_SIZE,
        "last",
    )
    assert batch.logits_indices.tolist() != list(range(len(LENGTHS)))

    outputs = []
    for device in ("cuda", "cpu"):
        config = EngineConfig(device=device, max_num_seqs=len(LENGTHS), **room)
        with ModelRunner(resolve("toy"), config, library) as runner:
            outputs.append(runner.forward(batch))

    on_gpu, on_cpu = outputs
    assert_same_bits(on_gpu.logits, on_cpu.logits)
    assert on_gpu.next_ids.tolist() == on_cpu.next_ids.tolist()
