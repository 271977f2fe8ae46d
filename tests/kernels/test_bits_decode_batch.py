"""A decode step of more than eight sequences: the bits of the single operations and of the twin."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from engine.batch import Batch, SequenceSlice, build_batch
from engine.bindings import Library, Tap, TapPoint
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops

pytestmark = pytest.mark.gpu

NUM_SEQS = (9, 16, 17, 31, 32, 33, 64, 65, 128, 129, 256)
EDGES = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 1023, 1024, 1025, 2048, 2049)
GROWTH = 48  # tokens by which a sequence may grow
NUM_TOKENS = sum(EDGES) + 260 * (96 + GROWTH + 16)
NAN = 0x7FC1


class Pair:
    """One model on both devices, its sequences prefilled alike."""

    def __init__(self, name: str, block_size: int, library: Library) -> None:
        directory = resolve(name)
        configs = [
            EngineConfig(
                device=device,
                block_size=block_size,
                num_blocks=-(-NUM_TOKENS // block_size) + 256 * (128 // block_size),
                max_seq_len=2304,
                max_num_tokens=2304,
                max_num_seqs=256,
            )
            for device in ("cpu", "cuda")
        ]
        self.cpu, self.gpu = (ModelRunner(directory, config, library) for config in configs)
        self.block_size, self.num_blocks = block_size, configs[0].num_blocks
        self.vocab_size = self.cpu.config.vocab_size
        random = np.random.default_rng(1)
        self.lengths = [*EDGES, *random.integers(1, 96, 256 - len(EDGES)).tolist()]
        order = random.permutation(256)
        self.lengths = [self.lengths[i] for i in order]
        blocks, start = random.permutation(self.num_blocks), 0
        self.tables = []
        for runner in (self.cpu, self.gpu):
            runner.fill_blocks(range(self.num_blocks), NAN)
        for length in self.lengths:
            count = -(-(length + GROWTH) // block_size)
            self.tables.append(blocks[start : start + count].tolist())
            start += count
            ids = random.integers(0, self.vocab_size, length).tolist()
            batch = build_batch([SequenceSlice(ids, 0, self.tables[-1])], block_size, "none")
            self.cpu.forward(batch)
            self.gpu.forward(batch)

    def step(self, rows: Sequence[int]) -> Batch:
        """The first new token of these sequences; every block table at full length."""
        batch = build_batch(
            [SequenceSlice([7 + i], self.lengths[i], self.tables[i]) for i in rows],
            self.block_size,
        )
        tables = np.zeros((len(rows), max(len(self.tables[i]) for i in rows)), np.int32)
        for row, i in zip(tables, rows, strict=True):
            row[: len(self.tables[i])] = self.tables[i]
        return Batch(**{**vars(batch), "block_tables": tables})

    def close(self) -> None:
        self.cpu.close()
        self.gpu.close()


@pytest.fixture(
    scope="module",
    params=[
        ("toy", 16),
        ("toy", 128),
        ("toy-wide", 32),
        ("toy-gqa3", 64),
        ("toy-gqa8", 128),
        ("toy-untied", 128),
    ],
    ids=lambda param: f"{param[0]}-B{param[1]}",
)
def pair(request: pytest.FixtureRequest, library: Library, gpu: Ops) -> Iterator[Pair]:
    made = Pair(*request.param, library)
    yield made
    made.close()


def differing(left: np.ndarray, right: np.ndarray) -> int:
    unsigned = np.dtype(f"u{left.dtype.itemsize}")
    return int(np.count_nonzero(left.view(unsigned) != right.view(unsigned)))


@pytest.mark.parametrize("num_seqs", NUM_SEQS)
def test_a_step_gives_the_bits_of_the_single_operations_and_of_the_twin(pair: Pair, num_seqs: int):
    rows = np.random.default_rng(num_seqs).permutation(256)[:num_seqs].tolist()
    batch = pair.step(rows)
    tap = Tap(TapPoint.embed, 0, out=pair.gpu.tap_buffer(TapPoint.embed, batch))

    fused = pair.gpu.forward(batch)
    caches = [pair.gpu.read_kv(i, batch.slot_mapping) for i in range(pair.gpu.config.num_layers)]
    single = pair.gpu.forward(batch, [tap])
    twin = pair.cpu.forward(batch)

    assert differing(single.logits, twin.logits) == 0
    assert differing(fused.logits, twin.logits) == 0
    assert fused.next_ids.tolist() == twin.next_ids.tolist()
    for layer, cache in enumerate(caches):
        for got, expected in zip(cache, pair.cpu.read_kv(layer, batch.slot_mapping), strict=True):
            assert (got == expected).all()


@pytest.mark.parametrize("num_seqs", [9, 40, 130])
def test_steps_in_a_row_give_the_twins_tokens_and_last_logits(pair: Pair, num_seqs: int):
    batch = pair.step(list(range(num_seqs)))
    logits = [np.empty((num_seqs, pair.vocab_size), np.float32) for _ in range(2)]

    ids = [
        runner.engine.decode(batch, 20, out)
        for runner, out in zip((pair.gpu, pair.cpu), logits, strict=True)
    ]

    assert (ids[0] == ids[1]).all()
    assert differing(*logits) == 0


def test_a_sequence_of_nan_leaves_its_neighbours_bits_alone(pair: Pair):
    rows = list(range(20, 60))
    batch = pair.step(rows)
    before = pair.gpu.forward(batch)
    poisoned = next(i for i, row in enumerate(rows) if 20 < pair.lengths[row] < 96)
    blocks = pair.tables[rows[poisoned]]

    pair.gpu.fill_blocks(blocks, NAN)
    after = pair.gpu.forward(batch)

    others = np.arange(len(rows)) != poisoned
    assert np.isnan(after.logits[poisoned]).all()
    assert differing(before.logits[others], after.logits[others]) == 0
    ids = np.random.default_rng(5).integers(0, pair.vocab_size, pair.lengths[rows[poisoned]])
    whole = SequenceSlice(ids.tolist(), 0, blocks)  # the cache is made whole again, on both devices
    for runner in (pair.cpu, pair.gpu):
        runner.fill_blocks(blocks, NAN)
        runner.forward(build_batch([whole], pair.block_size, "none"))


def test_a_thousand_repeats_give_the_same_bits(pair: Pair):
    batch = pair.step(list(range(100, 141)))
    first = pair.gpu.forward(batch)

    for _ in range(1000 // 6):  # six models
        again = pair.gpu.forward(batch)
        assert differing(first.logits, again.logits) == 0
        assert (first.next_ids == again.next_ids).all()
