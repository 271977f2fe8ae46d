"""The paged cache on the GPU: what fills a block fills all of it and nothing else."""

import numpy as np
import pytest

from engine.bindings import Library
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops

pytestmark = pytest.mark.gpu

NUM_BLOCKS, BLOCK_SIZE = 6, 16
BEFORE, AFTER = 0x4000, 0x7FC1


@pytest.mark.parametrize("filled", [[0], [3, 5], list(range(NUM_BLOCKS))], ids=str)
def test_a_filled_block_is_full_to_its_last_value_and_no_other_is_touched(
    library: Library, gpu: Ops, filled: list[int]
):
    config = EngineConfig(
        device="cuda",
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        max_seq_len=BLOCK_SIZE,
        max_num_tokens=BLOCK_SIZE,
        max_num_seqs=1,
    )
    slots = np.arange(NUM_BLOCKS * BLOCK_SIZE, dtype=np.int32)
    expected = np.where(np.isin(slots // BLOCK_SIZE, filled), AFTER, BEFORE)
    with ModelRunner(resolve("toy-gqa3"), config, library) as runner:
        for block in range(NUM_BLOCKS):
            runner.fill_blocks([block], BEFORE)
        runner.fill_blocks(filled, AFTER)

        for layer in range(runner.config.num_layers):
            for values in runner.read_kv(layer, slots):
                assert (values == expected[:, None, None]).all()
