"""The decode phase of a group: the last tokens of each prompt, one by one, side by side.

Each prompt is decoded by a sequence of its own. It shares the full KV blocks of the prefilled
prompt, prefills again what lies between them and the first decoded token, and decodes the rest.
Knows the engine's steps; knows nothing of verdicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch import SequenceSlice
from verification.oracle import Trace
from verification.passes import DECODE, Pass, Segment
from verification.steps import Runner, num_blocks_for, rows_of, tapped_step


@dataclass(frozen=True)
class DecodedPrompt:
    """One prompt of the phase.

    Args:
        segment: its rows in the prefill pass.
        num_decode: tokens that are decoded.
        num_shared: tokens whose KV is in the prefilled prompt's blocks.
        block_table: shared blocks, then blocks of its own.
    """

    segment: Segment
    num_decode: int
    num_shared: int
    block_table: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return self.segment.num_rows

    @property
    def first(self) -> int:
        """Position of the first decoded token."""
        return self.num_tokens - self.num_decode

    def rows(self, start: int, end: int) -> np.ndarray:
        """Rows of the prefill pass of some positions."""
        return self.segment.rows.start + np.arange(start, end)


def decoded_prompt(
    segment: Segment,
    num_decode: int,
    block_table: Sequence[int],
    free: list[int],
    block_size: int,
) -> DecodedPrompt:
    """Gives a prompt its blocks: full ones of `block_table`, and new ones taken from `free`."""
    num_shared = (segment.num_rows - num_decode) // block_size
    num_new = num_blocks_for(segment.num_rows, block_size) - num_shared
    new = [free.pop() for _ in range(num_new)]
    table = (*block_table[:num_shared], *new)
    return DecodedPrompt(segment, num_decode, num_shared * block_size, table)


def run_decode(
    runner: Runner, prompts: Sequence[DecodedPrompt], prefill: Pass
) -> tuple[Pass, np.ndarray]:
    """Runs the phase.

    Returns:
        The pass, rows prompt after prompt, and the arg-max of each row, int32.
    """
    middle = _run_middle(runner, prompts, prefill)
    outputs, next_ids = _run_steps(runner, prompts, prefill)
    rows = np.concatenate([p.rows(p.first, p.num_tokens) for p in prompts])
    logit_rows = prefill.logit_rows.numpy()
    known = prefill.reference
    source = None if known is None else rows_of(known, rows, logit_rows)
    segments = _segments(prompts)

    def keys(layer: int, index: int) -> tuple[Tensor, Tensor]:
        prompt = prompts[index]
        if known is not None:
            every = prompt.segment.rows
            return known["k_rope", layer][every], known["v", layer][every]
        shared = prompt.rows(0, prompt.num_shared)
        own = segments[index].rows
        k, v = (
            torch.cat(
                [prefill.outputs[t, layer][shared], middle[index][t, layer], outputs[t, layer][own]]
            )
            for t in ("k_rope", "v")
        )
        return k, v

    run = Pass(
        mode=prefill.mode,
        phase=DECODE,
        segments=segments,
        token_ids=prefill.token_ids[rows],
        positions=prefill.positions[rows],
        logit_rows=torch.arange(len(rows)),
        inputs=outputs if source is None else source,
        outputs=outputs,
        keys=keys,
        reference=source,
        twin=rows_of(prefill.outputs, rows, logit_rows),
    )
    return run, next_ids


def _run_steps(
    runner: Runner, prompts: Sequence[DecodedPrompt], prefill: Pass
) -> tuple[Trace, np.ndarray]:
    """Decodes, a token of each prompt per step; taps and arg-max with rows prompt after prompt."""
    logit_rows = prefill.logit_rows.numpy()
    steps: list[Trace] = []
    ids: list[np.ndarray] = []
    done: list[tuple[int, int]] = []  # (prompt, position), in the order of computation
    for step in range(max(p.num_decode for p in prompts)):
        active = [(i, p.first + step) for i, p in enumerate(prompts) if step < p.num_decode]
        slices = [_slice(prompts[i], prefill, at, at + 1) for i, at in active]
        forced = None
        if prefill.reference is not None:
            rows = np.concatenate([prompts[i].rows(at, at + 1) for i, at in active])
            forced = rows_of(prefill.reference, rows, logit_rows)
        outputs, chosen = tapped_step(runner, slices, np.arange(len(active)), forced)
        steps.append(outputs)
        ids.append(chosen)
        done += active
    order = sorted(range(len(done)), key=done.__getitem__)
    outputs = {key: torch.cat([step[key] for step in steps])[order] for key in steps[0]}
    return outputs, np.concatenate(ids)[order]


def _run_middle(runner: Runner, prompts: Sequence[DecodedPrompt], prefill: Pass) -> list[Trace]:
    """Prefills what lies between shared blocks and decoded tokens; k_rope and v of each prompt."""
    spans = [p.rows(p.num_shared, p.first) for p in prompts]
    active = [i for i, span in enumerate(spans) if len(span)]
    trace: Trace = {}
    if active:
        slices = [
            _slice(prompts[i], prefill, prompts[i].num_shared, prompts[i].first) for i in active
        ]
        forced = None
        if prefill.reference is not None:
            forced = rows_of(prefill.reference, np.concatenate([spans[i] for i in active]))
        trace, _ = tapped_step(runner, slices, np.empty(0), forced, outs=("k_rope", "v"))
    ends = np.cumsum([len(span) for span in spans])
    result = []
    for span, end in zip(spans, ends, strict=True):
        rows = slice(int(end) - len(span), int(end))
        cut = {key: values[rows] for key, values in trace.items()}
        empty = {key: prefill.outputs[key][:0] for key in prefill.outputs}
        result.append(cut if active else empty)
    return result


def _slice(prompt: DecodedPrompt, prefill: Pass, start: int, end: int) -> SequenceSlice:
    ids = prefill.token_ids[prompt.rows(start, end)].tolist()
    return SequenceSlice(ids, start, prompt.block_table)


def _segments(prompts: Sequence[DecodedPrompt]) -> tuple[Segment, ...]:
    ends = np.cumsum([p.num_decode for p in prompts]).tolist()
    return tuple(
        Segment(p.segment.prompt, rows, rows, p.first)
        for p, rows in (
            (p, slice(end - p.num_decode, end)) for p, end in zip(prompts, ends, strict=True)
        )
    )
