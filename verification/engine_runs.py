"""Runs the engine over a group of prompts with every tap open, and makes passes of it.

Decides batches, block tables and what is poisoned; knows nothing of verdicts. Each mode has two
phases. In prefill all prompts of the group are one step, each whole. In decode the last tokens of
each prompt come one by one: a sequence of its own shares the full KV blocks of the prefilled prompt
and computes the rest anew. Block tables are permuted, and every block is full of NaN before its
first use, so that a wrong table, a stale slot or a key too many shows. Local: every tap is forced
to the yardstick's value. Accumulated: free.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch import SequenceSlice, build_batch
from engine.model_runner import StepOutput
from verification.decode_run import decoded_prompt, run_decode
from verification.oracle import Trace
from verification.passes import ACCUMULATED, DECODE, LOCAL, PREFILL, Pass, Segment
from verification.steps import (
    Runner,
    as_bf16,
    num_blocks_for,
    slots_of,
    tapped_step,
)

SPARE_BLOCKS = 5  # in nobody's table: poison that must stay
POISON = 0x7FC1  # a bfloat16 NaN that no operation makes
MAX_LOGIT_ROWS = 64  # of one prompt: first, last and between; a vocabulary is wide
_BLOCK_SEED = 7


@dataclass(frozen=True)
class GroupPrompt:
    """A prompt, and the rows of it whose logits are graded."""

    id: str
    token_ids: tuple[int, ...]
    logit_rows: tuple[int, ...]
    num_decode: int  # last tokens that are decoded too; 0 for a prompt of one token

    @property
    def num_tokens(self) -> int:
        """Its length."""
        return len(self.token_ids)


def group_prompt(prompt_id: str, token_ids: Sequence[int], decode_tokens: int) -> GroupPrompt:
    """Chooses the decoded tokens and the logit rows: all, or some with every decoded one."""
    length = len(token_ids)
    num_decode = min(decode_tokens, length - 1)
    rows = set(range(length))
    if length > MAX_LOGIT_ROWS:
        tail = set(range(length - num_decode, length))
        spread = np.linspace(0, length - 1, MAX_LOGIT_ROWS - num_decode).astype(int).tolist()
        rows = tail | set(spread)
    return GroupPrompt(prompt_id, tuple(token_ids), tuple(sorted(rows)), num_decode)


@dataclass(frozen=True)
class ModeRun:
    """One mode's passes and what was read beside the taps.

    Args:
        passes: prefill and, unless no prompt has two tokens, decode.
        next_ids: phase -> the engine's arg-max of each logits row, int32.
        spoiled: (layer, slot) of spare memory that was written to, or None.
        tables: block table of each prompt's prefilled sequence, to decode on from.
        kv_slots: phase -> the cache slots of each segment's tokens from position 0 on.
    """

    passes: tuple[Pass, ...]
    next_ids: Mapping[str, np.ndarray]
    spoiled: tuple[int, int] | None
    tables: tuple[tuple[int, ...], ...]
    kv_slots: Mapping[str, tuple[np.ndarray, ...]]


def blocks_needed(prompts: Sequence[GroupPrompt], extra_tokens: int, block_size: int) -> int:
    """KV blocks that one mode of a group takes, spare ones included."""
    whole = sum(num_blocks_for(p.num_tokens + extra_tokens, block_size) for p in prompts)
    tails = sum(num_blocks_for(p.num_tokens, block_size) for p in prompts)
    return whole + tails + SPARE_BLOCKS


class GroupRun:
    """Runs one group of prompts; the engine's cache is its own until the next run."""

    def __init__(
        self,
        runner: Runner,
        prompts: Sequence[GroupPrompt],
        num_blocks: int,
        extra_tokens: int = 0,
    ) -> None:
        """Takes the engine, the size of its pool and how many tokens are decoded after a prompt."""
        self._runner = runner
        self._prompts = tuple(prompts)
        self._extra_tokens = extra_tokens
        self._block_size = runner.engine_config.block_size
        ids = list(range(num_blocks))
        random.Random(_BLOCK_SEED).shuffle(ids)
        self._spare, self._pool = ids[:SPARE_BLOCKS], ids[SPARE_BLOCKS:]

    def run(self, reference: Trace | None) -> ModeRun:
        """Both phases of one mode.

        Args:
            reference: the yardstick's values of every row, forced into every tap; None to run free.
        """
        self._runner.fill_blocks([*self._spare, *self._pool], POISON)
        free, size = list(self._pool), self._block_size
        lengths = [p.num_tokens for p in self._prompts]
        tables = [
            tuple(free.pop() for _ in range(num_blocks_for(length + self._extra_tokens, size)))
            for length in lengths
        ]
        prefill, prefill_ids = self._prefill(tables, reference)
        passes, next_ids = [prefill], {PREFILL: prefill_ids}
        slots = {PREFILL: tuple(slots_of(t, n, size) for t, n in zip(tables, lengths, strict=True))}
        decoded = [
            decoded_prompt(segment, p.num_decode, table, free, size)
            for segment, p, table in zip(prefill.segments, self._prompts, tables, strict=True)
            if p.num_decode
        ]
        if decoded:
            decode, next_ids[DECODE] = run_decode(self._runner, decoded, prefill)
            passes.append(decode)
            slots[DECODE] = tuple(slots_of(p.block_table, p.num_tokens, size) for p in decoded)
        return ModeRun(tuple(passes), next_ids, self._spoiled(), tuple(tables), slots)

    def run_untapped(self, tables: Sequence[tuple[int, ...]]) -> tuple[StepOutput, StepOutput]:
        """The prompts as they are served: without taps, so that the engine may fuse operations.

        Args:
            tables: of the prompts; their blocks are poisoned first, and left as these steps do.

        Returns:
            Prefill of all prompts in one step, and their last tokens once more, decoded; each with
            every prompt's last row of logits.
        """
        self._runner.fill_blocks([block for table in tables for block in table], POISON)
        prompts = list(zip(self._prompts, tables, strict=True))
        whole = [SequenceSlice(p.token_ids, 0, table) for p, table in prompts]
        last = [SequenceSlice(p.token_ids[-1:], p.num_tokens - 1, table) for p, table in prompts]
        prefilled, decoded = (
            self._runner.forward(build_batch(slices, self._block_size, "last"))
            for slices in (whole, last)
        )
        return prefilled, decoded

    def read_kv(self, layer: int, slots: np.ndarray) -> Tensor:
        """K beside V of some slots, bfloat16 [num_slots, 2 * num_kv_heads * head_dim]."""
        k, v = self._runner.read_kv(layer, slots)
        rows = len(slots)
        return as_bf16(np.concatenate((k.reshape(rows, -1), v.reshape(rows, -1)), axis=1))

    def decode_on(
        self,
        tables: Sequence[tuple[int, ...]],
        last_ids: np.ndarray,
        num_tokens: int,
        texts: Mapping[int, Sequence[int]] | None = None,
    ) -> dict[int, list[int]]:
        """Greedy choices after the prompts, side by side.

        Args:
            tables: of the prefilled prompts.
            last_ids: the engine's choice after each prompt.
            num_tokens: choices wanted.
            texts: index of a prompt -> the tokens it is fed; None: every prompt its own choices.

        Returns:
            Index of the prompt -> choices, the first made after the prompt itself. A number that
            is no token cannot be fed: the nearest that is stands for it, arg-max's own check
            having failed it already.
        """
        last = self._runner.config.vocab_size - 1
        chosen = range(len(self._prompts)) if texts is None else texts
        choices = {index: [int(np.clip(last_ids[index], 0, last))] for index in chosen}
        fed = choices if texts is None else texts
        for step in range(num_tokens - 1 if choices else 0):
            slices = [
                SequenceSlice([fed[i][step]], self._prompts[i].num_tokens + step, tables[i])
                for i in choices
            ]
            output = self._runner.forward(build_batch(slices, self._block_size, "last"))
            for index, new in zip(choices, output.next_ids, strict=True):
                choices[index].append(int(np.clip(new, 0, last)))
        return choices

    def _prefill(
        self, tables: Sequence[tuple[int, ...]], reference: Trace | None
    ) -> tuple[Pass, np.ndarray]:
        slices = [
            SequenceSlice(p.token_ids, 0, table)
            for p, table in zip(self._prompts, tables, strict=True)
        ]
        segments = _segments(self._prompts)
        logit_rows = np.concatenate(
            [
                s.rows.start + np.array(p.logit_rows)
                for s, p in zip(segments, self._prompts, strict=True)
            ]
        )
        outputs, ids = tapped_step(self._runner, slices, logit_rows, reference)
        inputs = outputs if reference is None else reference

        def keys(layer: int, index: int) -> tuple[Tensor, Tensor]:
            rows = segments[index].rows
            return inputs["k_rope", layer][rows], inputs["v", layer][rows]

        run = Pass(
            mode=ACCUMULATED if reference is None else LOCAL,
            phase=PREFILL,
            segments=segments,
            token_ids=torch.tensor([token for p in self._prompts for token in p.token_ids]),
            positions=torch.cat([torch.arange(p.num_tokens) for p in self._prompts]),
            logit_rows=torch.from_numpy(logit_rows),
            inputs=inputs,
            outputs=outputs,
            keys=keys,
            reference=reference,
        )
        return run, ids

    def _spoiled(self) -> tuple[int, int] | None:
        slots = np.concatenate(
            [np.arange(self._block_size) + b * self._block_size for b in self._spare]
        ).astype(np.int32)
        for layer in range(self._runner.config.num_layers):
            k, v = self._runner.read_kv(layer, slots)
            touched = ((k != POISON) | (v != POISON)).reshape(len(slots), -1).any(1)
            if touched.any():
                return layer, int(slots[touched.argmax()])
        return None


def _segments(prompts: Sequence[GroupPrompt]) -> tuple[Segment, ...]:
    rows = np.cumsum([0, *(p.num_tokens for p in prompts)]).tolist()
    logits = np.cumsum([0, *(len(p.logit_rows) for p in prompts)]).tolist()
    return tuple(
        Segment(p.id, slice(rows[i], rows[i + 1]), slice(logits[i], logits[i + 1]), 0)
        for i, p in enumerate(prompts)
    )
