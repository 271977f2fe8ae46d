"""A prompt of thousands of tokens in one step: the fused operations' bits are the single ones'.

A toy's layers have few weight rows, so that only a long prompt gives a multiprocessor more than one
tile, and the tokens more tiles than are taken together.
"""

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Library, Tap, TapPoint
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from tests.devices import skipped_without_device
from tests.system.trace import tokens
from tests.twin.bits import assert_same_bits

pytestmark = pytest.mark.gpu

LONGEST = 4500


@pytest.mark.parametrize("length", [4200, 4400, LONGEST])
@pytest.mark.parametrize("name", ["toy", "toy-gqa3"])
def test_a_long_prefill_is_the_tapped_one(library: Library, name: str, length: int):
    room = EngineConfig(
        "cuda",
        num_blocks=40,
        block_size=128,
        max_seq_len=LONGEST,
        max_num_tokens=LONGEST,
        max_num_seqs=1,
    )
    table = np.random.default_rng(length).permutation(40).tolist()
    batch = build_batch([SequenceSlice(tokens(length, length), 0, table)], 128, "all")
    results = []
    with skipped_without_device():
        runner = ModelRunner(resolve(name), room, library)
    with runner:
        for taps in (
            [Tap(TapPoint.embed, 0, out=runner.tap_buffer(TapPoint.embed, batch))],
            [],
        ):
            output = runner.forward(batch, taps)
            results.append([output.logits, *runner.read_kv(1, batch.slot_mapping)])

    for found, expected in zip(*results, strict=True):
        assert_same_bits(found, expected)
