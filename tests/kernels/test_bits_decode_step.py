"""The fused decode step writes the bits of the operations it fuses, and so does the twin."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Library, Tap, TapPoint
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops

BLOCK_SIZES = (16, 128)
NAN = 0x7FC1


class Pair:
    """One model on both devices, its sequences prefilled alike."""

    def __init__(self, name: str, block_size: int, library: Library) -> None:
        config = EngineConfig(
            device="cpu",
            num_threads=0,
            block_size=block_size,
            num_blocks=8 * (2304 // block_size),
            max_seq_len=2304,
            max_num_tokens=2304,
            max_num_seqs=8,
        )
        self.block_size = block_size
        directory = resolve(name)
        self.cpu = ModelRunner(directory, config, library)
        cuda = EngineConfig(**{**vars(config), "device": "cuda"})
        self.gpu = ModelRunner(directory, cuda, library)
        self.num_blocks = config.num_blocks
        self.vocab_size = self.cpu.config.vocab_size

    def prefill(self, lengths: Sequence[int]) -> list[list[int]]:
        random = np.random.default_rng(sum(lengths))
        blocks = random.permutation(self.num_blocks)
        tables, start = [], 0
        for runner in (self.cpu, self.gpu):
            runner.fill_blocks(range(self.num_blocks), NAN)
        for length in lengths:
            count = -(-(length + 80) // self.block_size)
            table = blocks[start : start + count].tolist()
            start += count
            ids = random.integers(0, self.vocab_size, length).tolist()
            batch = build_batch([SequenceSlice(ids, 0, table)], self.block_size, "none")
            self.cpu.forward(batch)
            self.gpu.forward(batch)
            tables.append(table)
        return tables

    def step(self, ids: Sequence[int], lengths: Sequence[int], tables: list[list[int]]):
        return build_batch(
            [
                SequenceSlice([token], length, table)
                for token, length, table in zip(ids, lengths, tables, strict=True)
            ],
            self.block_size,
        )

    def close(self) -> None:
        self.cpu.close()
        self.gpu.close()


@pytest.fixture(
    scope="module",
    params=[
        (name, size)
        for name in ("toy", "toy-wide", "toy-gqa3", "toy-gqa4", "toy-gqa8", "toy-untied", "toy-mha")
        for size in BLOCK_SIZES
    ],
    ids=lambda param: f"{param[0]}-B{param[1]}",
)
def pair(request: pytest.FixtureRequest, library: Library, gpu: Ops) -> Iterator[Pair]:
    made = Pair(*request.param, library)
    yield made
    made.close()


LENGTHS = [
    (5,),
    (127,),
    (128,),
    (129,),
    (1023, 1),
    (1024, 15, 16),
    (1025, 2047, 2048, 2100),
    (1, 17, 33, 64, 127, 255, 1023, 31),
    # More tiles than the blocks can share evenly: rows are cut by segments, the last of one tile.
    (1100, 2049, 2048, 2100, 1025, 2200, 1030, 1024),
]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_fused_step_gives_the_bits_of_the_single_operations_and_of_the_twin(
    pair: Pair, lengths: tuple[int, ...]
) -> None:
    tables = pair.prefill(lengths)
    batch = pair.step([7 + i for i in range(len(lengths))], lengths, tables)
    unfused_tap = Tap(TapPoint.embed, 0, out=pair.gpu.tap_buffer(TapPoint.embed, batch))

    fused = pair.gpu.forward(batch)
    single = pair.gpu.forward(batch, [unfused_tap])
    twin = pair.cpu.forward(batch)

    assert np.count_nonzero(single.logits.view(np.uint32) != twin.logits.view(np.uint32)) == 0
    assert np.count_nonzero(fused.logits.view(np.uint32) != twin.logits.view(np.uint32)) == 0
    assert fused.next_ids.tolist() == twin.next_ids.tolist()
    for layer in range(pair.cpu.config.num_layers):
        for got, expected in zip(
            pair.gpu.read_kv(layer, batch.slot_mapping),
            pair.cpu.read_kv(layer, batch.slot_mapping),
            strict=True,
        ):
            assert (got == expected).all()


@pytest.mark.gpu
def test_steps_in_a_row_give_the_twins_tokens_and_last_logits(pair: Pair) -> None:
    lengths = (100, 1020, 1)
    tables = pair.prefill(lengths)
    slices = [
        SequenceSlice([3 + i], length, table)
        for i, (length, table) in enumerate(zip(lengths, tables, strict=True))
    ]
    batch = build_batch(slices, pair.block_size)
    width = max(len(table) for table in tables)
    padded = np.zeros((len(tables), width), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    batch = type(batch)(**{**vars(batch), "block_tables": padded})
    logits = [np.empty((3, pair.vocab_size), np.float32) for _ in range(2)]

    ids = [
        runner.engine.decode(batch, 75, out)
        for runner, out in zip((pair.gpu, pair.cpu), logits, strict=True)
    ]

    assert (ids[0] == ids[1]).all()
    assert (logits[0].view(np.uint32) == logits[1].view(np.uint32)).all()
