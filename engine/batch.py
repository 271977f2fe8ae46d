"""Turn sequences into the index arrays of one step.

Pure functions over token ids, positions and block tables; knows nothing of devices or C.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.errors import InvalidArgument


@dataclass(frozen=True)
class SequenceSlice:
    """The part of one sequence that a step computes.

    Args:
        token_ids: its new tokens, in order, at least one.
        start: position of the first new token; everything before it is in the cache.
        block_table: KV block ids in position order, enough for start + len(token_ids) tokens.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]


@dataclass(frozen=True)
class Batch:
    """The index arrays of a step, int32; shapes as in csrc/include/engine.h, EngineBatch."""

    input_ids: np.ndarray  # [num_tokens]
    positions: np.ndarray  # [num_tokens]
    slot_mapping: np.ndarray  # [num_tokens]
    cu_seqlens_q: np.ndarray  # [num_seqs + 1]
    seq_lens: np.ndarray  # [num_seqs]
    block_tables: np.ndarray  # [num_seqs, max_blocks_per_seq]
    logits_indices: np.ndarray  # [num_logits]


def slot_mapping(block_table: Sequence[int], start: int, end: int, block_size: int) -> np.ndarray:
    """Cache slots of one sequence's tokens at positions start .. end - 1.

    Args:
        block_table: KV block ids in position order.
        start, end: token positions, 0 <= start <= end <= len(block_table) * block_size.
        block_size: tokens per KV block.

    Returns:
        Slots, int32, [end - start]; slot = block_id * block_size + position % block_size.

    Raises:
        InvalidArgument: end reaches past the last block.

    Source: Kwon et al., PagedAttention, arXiv:2309.06180, section 4.
    """
    room = len(block_table) * block_size
    if not 0 <= start <= end <= room:
        raise InvalidArgument(
            f"positions {start} .. {end} do not fit {len(block_table)} blocks of {block_size}"
        )
    positions = np.arange(start, end)
    blocks = np.asarray(block_table, np.int64)[positions // block_size]
    return (blocks * block_size + positions % block_size).astype(np.int32)


def build_batch(
    slices: Sequence[SequenceSlice],
    block_size: int,
    logits: Literal["last", "all", "none"] = "last",
) -> Batch:
    """Lay the slices one after another.

    Args:
        slices: at least one; each with at least one new token.
        block_size: tokens per KV block.
        logits: the rows whose logits are wanted: each sequence's last, every one, or none.

    Returns:
        The step's arrays; block_tables is padded with zeros, which the engine never reads.

    Raises:
        InvalidArgument: no slice, an empty one, or a block table too short.
    """
    if not slices or any(len(item.token_ids) == 0 for item in slices):
        raise InvalidArgument("a step needs a sequence, and each sequence a new token")
    lengths = [len(item.token_ids) for item in slices]
    ends = [item.start + length for item, length in zip(slices, lengths, strict=True)]
    cu_seqlens_q = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tables = np.zeros((len(slices), max(-(-end // block_size) for end in ends)), np.int32)
    for row, item, end in zip(tables, slices, ends, strict=True):
        used = -(-end // block_size)
        row[: min(used, len(item.block_table))] = item.block_table[:used]
    rows = {
        "last": cu_seqlens_q[1:] - 1,
        "all": np.arange(cu_seqlens_q[-1]),
        "none": np.empty(0),
    }[logits]
    return Batch(
        input_ids=np.concatenate([np.asarray(item.token_ids, np.int32) for item in slices]),
        positions=np.concatenate(
            [np.arange(i.start, end, dtype=np.int32) for i, end in zip(slices, ends, strict=True)]
        ),
        slot_mapping=np.concatenate(
            [
                slot_mapping(i.block_table, i.start, end, block_size)
                for i, end in zip(slices, ends, strict=True)
            ]
        ),
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=np.asarray(ends, np.int32),
        block_tables=tables,
        logits_indices=rows.astype(np.int32),
    )
