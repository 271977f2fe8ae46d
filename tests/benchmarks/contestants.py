"""What is timed against what: this engine, and how any contestant is asked to run a point.

A contestant prepares a point outside the timing; every timed call then starts from the same state,
so calls may be repeated and interleaved. Knows nothing of clocks.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.batch import Batch, SequenceSlice, build_batch
from engine.bindings import Library
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from tests.benchmarks.points import Point

BLOCK_SIZE = 128
PREFILL_BUDGET = 8192  # tokens of a step


class Contestant(Protocol):
    """Who runs points."""

    name: str

    def prepare(self, point: Point, prompts: np.ndarray) -> None:
        """Gets ready for one point.

        Args:
            prompts: token ids [batch, context]; a decode starts with the last one of each.
        """

    def run(self) -> float | None:
        """The timed call; what it computed is on the device or the host afterwards.

        Returns:
            Seconds, of a contestant whose process is not the one that times it.
        """

    def token_ids(self) -> np.ndarray:
        """What the last run chose: int [steps, batch]; of a prefill [1, 1]."""


def room_for(points: Sequence[Point], device: str) -> EngineConfig:
    """One engine with room for every point."""
    longest = max(p.context + p.steps for p in points)
    blocks = max(p.batch * -(-(p.context + p.steps) // BLOCK_SIZE) for p in points)
    return EngineConfig(
        device=device,
        num_threads=0,
        block_size=BLOCK_SIZE,
        num_blocks=blocks,
        max_seq_len=longest,
        max_num_tokens=min(PREFILL_BUDGET, max(p.context for p in points)),
        max_num_seqs=max(p.batch for p in points),
    )


class Touchstone:
    """This engine, or another build of it."""

    def __init__(
        self, directory: Path, room: EngineConfig, library: Library, name: str = "touchstone"
    ) -> None:
        self.name = name
        self.runner = ModelRunner(directory, room, library)
        self._batch: Batch | None = None
        self._steps = 0
        self._ids: np.ndarray | None = None

    def prepare(self, point: Point, prompts: np.ndarray) -> None:
        """Fills the cache and builds the step; blocks lie in a shuffled order."""
        per_seq = -(-(point.context + point.steps) // BLOCK_SIZE)
        blocks = np.random.default_rng(0).permutation(self.runner.engine_config.num_blocks)
        tables = blocks[: point.batch * per_seq].reshape(point.batch, per_seq).astype(np.int32)
        if point.kind == "prefill":
            part = SequenceSlice(prompts[0], 0, tables[0].tolist())
            self._batch, self._steps = build_batch([part], BLOCK_SIZE), 0
            return
        self._fill(prompts[:, :-1], tables)
        last = point.context - 1
        parts = [
            SequenceSlice([int(row[-1])], last, table.tolist())
            for row, table in zip(prompts, tables, strict=True)
        ]
        batch = build_batch(parts, BLOCK_SIZE)
        self._batch, self._steps = replace(batch, block_tables=tables), point.steps

    def _fill(self, prompts: np.ndarray, tables: np.ndarray) -> None:
        """Prefills every sequence, as many tokens a step as fit."""
        budget = self.runner.engine_config.max_num_tokens
        most = self.runner.engine_config.max_num_seqs
        pending: list[SequenceSlice] = []
        used = 0
        for row, table in zip(prompts, tables.tolist(), strict=True):
            for start in range(0, len(row), budget):
                part = SequenceSlice(row[start : start + budget], start, table)
                if used + len(part.token_ids) > budget or len(pending) == most:
                    self._step(pending)
                    pending, used = [], 0
                pending.append(part)
                used += len(part.token_ids)
        self._step(pending)

    def _step(self, parts: list[SequenceSlice]) -> None:
        if parts:
            self.runner.engine.forward(build_batch(parts, BLOCK_SIZE, "none"))

    def run(self) -> None:
        """Decodes the point's steps, or prefills its prompt; the ids are on the host at the end."""
        if self._steps:
            self._ids = self.runner.engine.decode(self._batch, self._steps)
        else:
            self._ids = np.empty(1, np.int32)
            self.runner.engine.forward(self._batch, next_ids=self._ids)

    def token_ids(self) -> np.ndarray:
        """See Contestant."""
        return np.atleast_2d(self._ids)

    def check(self, point: Point, prompts: np.ndarray) -> dict:
        """Holds what the timed calls left behind to another path through the code, bit for bit.

        Of a decode: the ids and the cache, by one prefill over that cache: the same tokens, all
        steps and sequences. Of a prefill: the same token when the prompt is cut into steps.
        """
        ids, tables = self.token_ids(), self._batch.block_tables.tolist()
        if point.kind == "prefill":
            cut, found = point.context // 3 + 1, np.empty(1, np.int32)
            for start in range(0, point.context, cut):
                part = SequenceSlice(prompts[0, start : start + cut], start, tables[0])
                self.runner.engine.forward(build_batch([part], BLOCK_SIZE), next_ids=found)
            what = "prefill cut into steps"
            return {"what": what, "tokens": 1, "equal": bool((found == ids).all())}
        fed = np.concatenate([prompts[:, -1:], ids.T[:, :-1]], axis=1)  # [batch, steps]
        found = np.empty_like(fed)
        per = max(1, self.runner.engine_config.max_num_tokens // point.steps)
        for first in range(0, point.batch, per):
            rows = range(first, min(first + per, point.batch))
            parts = [SequenceSlice(fed[r], point.context - 1, tables[r]) for r in rows]
            step = build_batch(parts, BLOCK_SIZE, "all")
            chosen = np.empty(len(step.logits_indices), np.int32)
            self.runner.engine.forward(step, next_ids=chosen)
            found[first : first + len(parts)] = chosen.reshape(len(parts), -1)
        equal = bool((found == ids.T).all())
        return {"what": "decode against prefill", "tokens": int(found.size), "equal": equal}

    def shortfall(self, chosen: np.ndarray) -> float:
        """How far the logits of others' first tokens lie below this engine's largest.

        Args:
            chosen: the first token of each sequence, [batch].

        Returns:
            The largest distance, in standard deviations of the row's logits. A wrong computation
            picks a token four of them below; bf16 moves a logit by a few hundredths of one.
        """
        logits = np.empty((len(chosen), self.runner.config.vocab_size), np.float32)
        if self._steps:
            self.runner.engine.decode(self._batch, 1, logits)
        else:
            self.runner.engine.forward(self._batch, logits=logits)
        picked = logits[np.arange(len(chosen)), chosen]
        return float(np.max((logits.max(1) - picked) / logits.std(1)))

    def close(self) -> None:
        """Give everything back."""
        self.runner.close()


def prompts_of(point: Point, vocab_size: int) -> np.ndarray:
    """Random token ids [batch, context], the same for every contestant."""
    random = np.random.default_rng(point.batch * 100_003 + point.context)
    return random.integers(0, vocab_size, (point.batch, point.context), dtype=np.int32)


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    """The share of sequences whose first chosen token is the same.

    Later tokens are left out: after one tie two texts have nothing to say about each other.
    """
    return float(np.mean(found[0] == expected[0]))
