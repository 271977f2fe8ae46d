"""More tiles than thread blocks, so that a block goes from one to the next: the twin's bits.

The toys' layers have fewer tiles than the card has multiprocessors: each block computes one and
leaves. Here gate, up and the LM head have several for each, and down has 32 chunks, one short; or
q, k and v together, or O and down, have more than half as many. And a vocabulary that ends inside a
tile, where no row beyond it may win the arg-max.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from engine.batch import Batch, SequenceSlice, build_batch
from engine.bindings import Engine, Library
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import cache_root
from engine.ops import Ops
from engine.sources.shape import resolve_random
from engine.sources.toy import CONFIGS
from tests.kernels.inputs import assert_same_bits
from tests.kernels.sequences import Sequences
from tests.system.weights import load

pytestmark = pytest.mark.gpu

SHAPES = {
    "many-tiles": {"intermediate_size": 16_320, "vocab_size": 40_000},
    "many-heads": {"num_heads": 32, "num_kv_heads": 8},  # two tiles of tokens: 96 of q, k and v
    # 68 tiles of 64 rows by 32 tokens of 128, by 64 of 256: no block shares one of O's or down's.
    "many-rows": {"hidden_size": 1088},
}
NUM_SEQS = (1, 8, 9, 33, 70, 130)  # one launch for all of a step; each bucket of many sequences
PROMPT = 150
ONE = 0x3F80


@pytest.fixture(scope="module", params=SHAPES)
def both(request: pytest.FixtureRequest, library: Library, gpu: Ops) -> Iterator[list[Sequences]]:
    """The same sequences on the GPU and on the twin; the last one's prompt is still to come."""
    config = replace(CONFIGS["toy"], num_layers=1, **SHAPES[request.param])
    directory = resolve_random(request.param, config, cache_root(), lambda what, done, total: None)
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


@pytest.mark.parametrize("num_seqs", [8, 33, 130])
def test_no_row_beyond_the_vocabulary_wins_where_every_logit_is_below_zero(
    library: Library, gpu: Ops, num_seqs: int
):
    config, weights = load("toy-untied")
    config = replace(config, vocab_size=300)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:300].copy()
    # One channel decides, with one sign for every id: half of the rows have no logit above zero.
    weights["model.norm.weight"][:] = 0
    weights["model.norm.weight"][0] = ONE
    weights["lm_head.weight"] &= 0x7FFF
    slices = [SequenceSlice([7 * i % 300], 0, [i]) for i in range(num_seqs)]
    batch = build_batch(slices, 16)

    found = []
    for device in ("cuda", "cpu"):
        room = EngineConfig(device, num_seqs, 16, num_seqs, num_seqs, block_size=16)
        with Engine(library, config, room) as engine:
            for name, values in weights.items():
                engine.load_weight(name, np.ascontiguousarray(values))
            engine.finish_loading()
            logits, ids = np.empty((num_seqs, 300), np.float32), np.empty(num_seqs, np.int32)
            engine.forward(batch, (), logits, ids)
            found.append((logits, ids))

    (gpu_logits, gpu_ids), (twin_logits, twin_ids) = found
    assert (twin_logits.max(axis=1) < 0).any()
    assert_same_bits(gpu_logits, twin_logits)
    assert gpu_ids.tolist() == twin_ids.tolist()
