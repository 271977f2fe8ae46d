"""Runs one operation over a model's known inputs and makes passes of it, ready to be graded.

The inputs are transformers' own of every layer, or the probes; the result of each tap is what the
stranger gave for them. A second pass has each prompt's last tokens one call each: the same bits are
wanted. Knows operations' arguments; decides no verdict.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch, SequenceSlice, build_batch
from engine.config import ModelConfig
from verification.engine_runs import GroupPrompt
from verification.oracle import Reference, Trace
from verification.passes import DECODE, LOCAL, PREFILL, Pass, Segment
from verification.steps import LOGIT_TAPS, as_bf16, num_blocks_for, rows_of
from verification.taps import POINT, TapKey, all_keys, source_key

BLOCK_SIZE = 16
SPARE_BLOCKS = 3
_BLOCK_SEED = 5

Call = Callable[..., np.ndarray]


def bits_of(values: Tensor) -> np.ndarray:
    """A bfloat16 tensor as uint16."""
    return values.contiguous().view(torch.uint16).numpy()


def run_operation(
    call: Call,
    operation: str,
    config: ModelConfig,
    reference: Reference,
    group: Sequence[GroupPrompt],
    trace: Trace,
    is_probe: bool,
) -> list[Pass]:
    """The passes of one operation.

    Args:
        call: the stranger's operation.
        operation: a key of taps.OPERATIONS that belongs to a tap.
        trace: every tap of the group's prompts, forced on every operation.
        is_probe: transformers did not make the trace, so its values are no reference.
    """
    keys = [key for key in all_keys(config.num_layers) if POINT[key[0]].operation == operation]
    feed = _Feed(call, config, reference)
    prefill = prefill_pass(group, trace)
    outputs = {key: feed(key, prefill, _slices(prefill)) for key in keys}
    passes = [replace(prefill, outputs=outputs)]
    last = [(s, at) for s, p in zip(prefill.segments, group, strict=True) for at in _last(p)]
    if last:
        rows = np.array([segment.rows.start + at for segment, at in last])
        decode = _decode(prefill, last, rows)
        outputs = {key: _alone(feed, key, decode) for key in keys}
        twin = rows_of(passes[0].outputs, rows, prefill.logit_rows.numpy())
        passes.append(replace(decode, outputs=outputs, twin=twin))
    return [replace(each, reference=None) for each in passes] if is_probe else passes


def _last(prompt: GroupPrompt) -> range:
    return range(prompt.num_tokens - prompt.num_decode, prompt.num_tokens)


def prefill_pass(group: Sequence[GroupPrompt], trace: Trace) -> Pass:
    """All prompts as one step; its outputs are still to come."""
    ends = np.cumsum([0, *(p.num_tokens for p in group)]).tolist()
    logit_ends = np.cumsum([0, *(len(p.logit_rows) for p in group)]).tolist()
    segments = tuple(
        Segment(p.id, slice(*ends[i : i + 2]), slice(*logit_ends[i : i + 2]), 0)
        for i, p in enumerate(group)
    )
    logit_rows = [
        s.rows.start + row for s, p in zip(segments, group, strict=True) for row in p.logit_rows
    ]

    def keys(layer: int, index: int) -> tuple[Tensor, Tensor]:
        rows = segments[index].rows
        return trace["k_rope", layer][rows], trace["v", layer][rows]

    return Pass(
        mode=LOCAL,
        phase=PREFILL,
        segments=segments,
        token_ids=torch.tensor([token for p in group for token in p.token_ids]),
        positions=torch.cat([torch.arange(p.num_tokens) for p in group]),
        logit_rows=torch.tensor(logit_rows),
        inputs=trace,
        outputs={},
        keys=keys,
        reference=trace,
    )


def _decode(prefill: Pass, last: Sequence[tuple[Segment, int]], rows: np.ndarray) -> Pass:
    """One token each; a token is a segment of its own."""
    owners = [prefill.segments.index(segment) for segment, _ in last]
    segments = tuple(
        Segment(segment.prompt, slice(i, i + 1), slice(i, i + 1), at)
        for i, (segment, at) in enumerate(last)
    )
    inputs = rows_of(prefill.inputs, rows, prefill.logit_rows.numpy())
    return replace(
        prefill,
        phase=DECODE,
        segments=segments,
        token_ids=prefill.token_ids[rows],
        positions=prefill.positions[rows],
        logit_rows=torch.arange(len(rows)),
        inputs=inputs,
        keys=lambda layer, index: prefill.keys(layer, owners[index]),
        reference=inputs,
    )


def _alone(feed: "_Feed", key: TapKey, run: Pass) -> Tensor:
    """A tap of a pass, each row in a call of its own."""
    parts = []
    for index, segment in enumerate(run.segments):
        row = slice(index, index + 1)
        inputs = {name: values[row] for name, values in run.inputs.items()}
        single = replace(
            run,
            segments=(replace(segment, rows=slice(0, 1), logit_rows=slice(0, 1)),),
            token_ids=run.token_ids[row],
            positions=run.positions[row],
            logit_rows=torch.zeros(1, dtype=torch.int64),
            inputs=inputs,
            keys=lambda layer, _, index=index: run.keys(layer, index),
        )
        parts.append(feed(key, single, _slices(single)))
    return torch.cat(parts)


def _slices(run: Pass) -> list[SequenceSlice]:
    """The pass's sequences with permuted block tables."""
    ends = [s.first_position + s.num_rows for s in run.segments]
    needed = [num_blocks_for(end, BLOCK_SIZE) for end in ends]
    blocks = list(range(sum(needed) + SPARE_BLOCKS))
    random.Random(_BLOCK_SEED).shuffle(blocks)
    return [
        SequenceSlice(
            run.token_ids[s.rows].tolist(), s.first_position, [blocks.pop() for _ in range(count)]
        )
        for s, count in zip(run.segments, needed, strict=True)
    ]


class _Feed:
    """Calls the operation for one tap of a pass."""

    def __init__(self, call: Call, config: ModelConfig, reference: Reference) -> None:
        self._call = call
        self._config = config
        self._reference = reference

    def __call__(self, key: TapKey, run: Pass, slices: Sequence[SequenceSlice]) -> Tensor:
        tap, layer = key
        config, point = self._config, POINT[tap]
        x = [self._input(name, key, run) for name in point.inputs]
        weight = None
        if point.hf_weight is not None:
            weight = bits_of(self._reference.weight(point.weight(layer)))
        if point.operation == "embedding":
            return as_bf16(self._call(weight, run.token_ids.to(torch.int32).numpy()))
        if point.operation == "rms_norm":
            return as_bf16(self._call(x[0], weight, config.rms_norm_eps))
        if point.operation == "linear_f32":
            return torch.from_numpy(self._call(x[0], weight))
        if point.operation == "rotary_embedding":
            return self._rotary(x[0], run)
        if point.operation == "attention":
            return self._attention(x[0], layer, run, build_batch(slices, BLOCK_SIZE, "none"))
        if weight is not None:  # linear
            return as_bf16(self._call(x[0], weight))
        return as_bf16(self._call(*x))  # residual_add, silu_and_mul

    def _input(self, name: str, key: TapKey, run: Pass) -> np.ndarray:
        tap, layer = key
        values = run.inputs[source_key(name, layer, self._config.num_layers, tap)]
        is_whole = tap in LOGIT_TAPS and name not in LOGIT_TAPS
        return bits_of(values[run.logit_rows] if is_whole else values)

    def _rotary(self, x: np.ndarray, run: Pass) -> Tensor:
        table = torch.cat(self._reference.rope_table(range(int(run.positions.max()) + 1)), 1)
        heads = x.reshape(len(x), -1, self._config.head_dim)
        positions = run.positions.to(torch.int32).numpy()
        return as_bf16(self._call(heads, bits_of(table), positions)).reshape(x.shape)

    def _attention(self, q: np.ndarray, layer: int, run: Pass, batch: Batch) -> Tensor:
        config = self._config
        num_blocks = SPARE_BLOCKS + int(sum(num_blocks_for(n, BLOCK_SIZE) for n in batch.seq_lens))
        shape = (num_blocks * BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        cache = [np.full(shape, 0x7FC1, np.uint16) for _ in range(2)]  # NaN where nobody's
        for index, segment in enumerate(run.segments):
            end = segment.first_position + segment.num_rows
            at = np.arange(end)
            slots = batch.block_tables[index][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            for into, values in zip(cache, run.keys(layer, index), strict=True):
                into[slots] = bits_of(values[:end]).reshape(end, *shape[1:])
        heads = q.reshape(len(q), config.num_heads, config.head_dim)
        out = self._call(heads, *cache, batch, BLOCK_SIZE, num_blocks)
        return as_bf16(out).reshape(q.shape)
