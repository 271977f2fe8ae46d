"""Sequences scattered over a paged cache: which slot holds what, and which holds nothing."""

from dataclasses import dataclass

import numpy as np

from engine.batch import Batch, SequenceSlice, build_batch
from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import normal


@dataclass(frozen=True)
class Sequence:
    """One sequence: everything in position order.

    Args:
        q: queries of the last len(q) positions, [num_new, num_heads, 64] bf16 bits.
        k, v: [seq_len, num_kv_heads, 64] bf16 bits.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    @property
    def start(self) -> int:
        return len(self.k) - len(self.q)

    def expected(self) -> np.ndarray:
        return contract.attention(self.q, self.k, self.v, self.start)


def draw(
    seed: int,
    seq_len: int,
    num_new: int,
    num_heads: int = 1,
    num_kv_heads: int = 1,
    scale: float = 1.0,
) -> Sequence:
    """A sequence of normal values; scale 3 makes attention look at few keys."""
    return Sequence(
        normal(seed, num_new, num_heads, 64, scale=scale),
        normal(seed + 1, seq_len, num_kv_heads, 64),
        normal(seed + 2, seq_len, num_kv_heads, 64),
    )


def attend(
    ops: Ops,
    sequences: list[Sequence],
    block_size: int = 16,
    seed: int = 0,
    poison_k: int = 0x7FC1,
    poison_v: int = 0x7FC1,
    spare_blocks: int = 3,
) -> list[np.ndarray]:
    """Attention of all sequences in one step, their blocks dealt out at random.

    Every slot that holds no token holds the poison.
    """
    counts = [-(-len(s.k) // block_size) for s in sequences]
    num_blocks = sum(counts) + spare_blocks
    blocks = np.random.default_rng(seed).permutation(num_blocks)
    k = np.full((num_blocks * block_size, *sequences[0].k.shape[1:]), poison_k, np.uint16)
    v = np.full_like(k, poison_v)
    slices, at = [], 0
    for sequence, count in zip(sequences, counts, strict=True):
        table = [int(block) for block in blocks[at : at + count]]
        at += count
        for position in range(len(sequence.k)):
            slot = table[position // block_size] * block_size + position % block_size
            k[slot], v[slot] = sequence.k[position], sequence.v[position]
        slices.append(SequenceSlice([0] * len(sequence.q), sequence.start, table))
    batch: Batch = build_batch(slices, block_size, "none")
    q = np.concatenate([sequence.q for sequence in sequences])
    out = ops.attention(q, k, v, batch, block_size, num_blocks)
    return np.split(out, np.cumsum([len(s.q) for s in sequences])[:-1])
