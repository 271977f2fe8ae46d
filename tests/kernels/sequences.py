"""Sequences in the paged cache of one engine: blocks in any order, poison wherever nobody owns.

Knows an engine's steps; expects nothing of their results.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.batch import Batch, SequenceSlice, build_batch
from engine.model_runner import ModelRunner

POISONS = (0x7FC1, 0x7F80, 0x7149)  # NaN, infinity, 1e30


class Sequences:
    """Prompts of random tokens, prefilled one by one, and steps that go on from their ends.

    Args:
        runner: with room for all of them.
        lengths: tokens of each prompt; 0: a prompt that is still to come.
        growth: tokens by which each may grow.
        seed: of tokens and blocks; engines given the same one hold the same sequences.
        cached: bf16 bits that stand for every cached key and value; None: prompts are prefilled.
    """

    def __init__(
        self,
        runner: ModelRunner,
        lengths: Sequence[int],
        growth: int,
        seed: int = 1,
        cached: int | None = None,
    ) -> None:
        self.runner, self.lengths = runner, tuple(lengths)
        self.block_size = runner.engine_config.block_size
        random = np.random.default_rng(seed)
        blocks = random.permutation(runner.engine_config.num_blocks)
        for i, poison in enumerate(POISONS):
            runner.fill_blocks(blocks[i :: len(POISONS)].tolist(), poison)
        self.tables: list[list[int]] = []
        start = 0
        for length in lengths:
            count = -(-(length + growth) // self.block_size)
            self.tables.append(blocks[start : start + count].tolist())
            start += count
            if cached is not None:
                runner.fill_blocks(self.tables[-1], cached)
            elif length:
                ids = random.integers(0, runner.config.vocab_size, length).tolist()
                part = SequenceSlice(ids, 0, self.tables[-1])
                runner.forward(build_batch([part], self.block_size, "none"))

    def decode_step(self, rows: Sequence[int]) -> Batch:
        """One new token for each of these sequences; block tables at full length."""
        return self.step(rows, [1] * len(rows), "last")

    def step(self, rows: Sequence[int], counts: Sequence[int], logits: str = "all") -> Batch:
        """So many new tokens for each of these sequences."""
        vocab_size = self.runner.config.vocab_size
        parts = [
            SequenceSlice(
                [(7 + 31 * i + 5 * j) % vocab_size for j in range(count)],
                self.lengths[i],
                self.tables[i],
            )
            for i, count in zip(rows, counts, strict=True)
        ]
        batch = build_batch(parts, self.block_size, logits)
        tables = np.zeros((len(rows), max(len(self.tables[i]) for i in rows)), np.int32)
        for row, i in zip(tables, rows, strict=True):
            row[: len(self.tables[i])] = self.tables[i]
        return replace(batch, block_tables=tables)
