"""One step of the engine with its taps open, and the cache slots that a step uses.

Knows the shapes of taps and how tensors cross to numpy; decides nothing about prompts or phases.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch, SequenceSlice, build_batch
from engine.bindings import Tap
from engine.config import EngineConfig, ModelConfig
from engine.model_runner import StepOutput
from verification.oracle import Trace
from verification.taps import POINT, TapKey, all_keys

LOGIT_TAPS = ("final_norm", "logits")  # they have a row per wanted logits row, not per token


class Runner(Protocol):
    """What is needed of an engine; engine.model_runner.ModelRunner is one."""

    config: ModelConfig
    engine_config: EngineConfig

    def forward(self, batch: Batch, taps: Sequence[Tap] = ()) -> StepOutput:
        """Run one step."""

    def read_kv(self, layer: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """K and V of cache slots."""

    def fill_blocks(self, block_ids: Sequence[int], value: int) -> None:
        """Set blocks to one bit pattern."""


def tapped_step(
    runner: Runner,
    slices: Sequence[SequenceSlice],
    logit_rows: np.ndarray,
    forced: Trace | None,
    outs: Sequence[str] | None = None,
) -> tuple[Trace, np.ndarray]:
    """Runs one step.

    Args:
        logit_rows: rows of the step whose logits are wanted, ascending.
        forced: the values that replace those of the taps, logits left out; None: none.
        outs: taps to copy out; None: all.

    Returns:
        The taps, and the arg-max of each logits row, int32.
    """
    batch = build_batch(slices, runner.engine_config.block_size, "none")
    batch = replace(batch, logits_indices=logit_rows.astype(np.int32))
    config = runner.config
    buffers: dict[TapKey, np.ndarray] = {}
    taps = []
    for key in all_keys(config.num_layers):
        name, layer = key
        rows = len(batch.logits_indices if name in LOGIT_TAPS else batch.input_ids)
        if name == "logits" or rows == 0:
            continue
        out = force = None
        if outs is None or name in outs:
            out = buffers[key] = np.empty((rows, POINT[name].width(config)), np.uint16)
        if forced is not None:
            force = forced[key].contiguous().view(torch.uint16).numpy()
        if out is not None or force is not None:
            taps.append(Tap(POINT[name].tap_point, layer, out, force))
    step = runner.forward(batch, taps)
    trace = {key: as_bf16(bits) for key, bits in buffers.items()}
    if len(batch.logits_indices):
        trace["logits", 0] = torch.from_numpy(step.logits)
    return trace, step.next_ids


def rows_of(trace: Trace, rows: np.ndarray, logit_rows: np.ndarray | None = None) -> Trace:
    """Some rows of every tap.

    Args:
        rows: of the step.
        logit_rows: the step's; `rows` are all among them. None: final_norm and logits are left out.
    """
    index = torch.from_numpy(rows)
    chosen = {key: values[index] for key, values in trace.items() if key[0] not in LOGIT_TAPS}
    if logit_rows is not None:
        at = torch.from_numpy(np.searchsorted(logit_rows, rows))
        chosen |= {key: values[at] for key, values in trace.items() if key[0] in LOGIT_TAPS}
    return chosen


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """KV blocks that so many tokens fill."""
    return -(-num_tokens // block_size)


def slots_of(block_table: Sequence[int], num_tokens: int, block_size: int) -> np.ndarray:
    """Cache slots of a sequence's first tokens, int32."""
    positions = np.arange(num_tokens)
    blocks = np.asarray(block_table)[positions // block_size]
    return (blocks * block_size + positions % block_size).astype(np.int32)


def as_bf16(bits: np.ndarray) -> Tensor:
    """uint16 bits as a bfloat16 tensor that shares their memory."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16)
