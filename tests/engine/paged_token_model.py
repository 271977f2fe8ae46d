"""A model whose KV cache holds token ids: the policy's runner in tests, without a library.

A slot remembers the token and position written to it; a row's logits are a hash of what attention
would read through the block table. So a stale page, a wrong slot, a swapped row or a lost token
changes the logits at once, and costs microseconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from engine.batch import Batch
from engine.sampling import Logprobs, SamplingBatch

POISON = -1


@dataclass(frozen=True)
class Output:
    """As `StepOutput`: logits are only hashes here, int64 [num_logits, 1]."""

    logits: np.ndarray
    next_ids: np.ndarray
    logprobs: Logprobs | None = None


def next_id(tokens: Sequence[int], vocab_size: int) -> int:
    """The token that follows these, all of which count."""
    return hash_of(tokens) % vocab_size


def hash_of(tokens: Sequence[int]) -> int:
    digest = blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def drawn_from(h: int, row: np.void, edits: np.ndarray) -> int:
    """The hash that a row's token is drawn by: of its draw and of its edits, where it has them."""
    found = h
    if len(edits):
        found = hash_of([found, *repr(sorted(map(tuple, edits.tolist()))).encode()])
    if row["temperature"] != 0:
        ways = ("seed", "position", "choice", "temperature", "top_p", "min_p", "top_k")
        found = hash_of([found, *repr([row[way].item() for way in ways]).encode()])
    return found


def scores(hashes: list[int], sampling: SamplingBatch) -> Logprobs | None:
    """Logprobs that tell tokens, row and number apart."""
    if sampling.max_logprobs is None:
        return None
    logprobs = Logprobs.empty(len(hashes), sampling.max_logprobs)
    for i, (h, row) in enumerate(zip(hashes, sampling.rows, strict=True)):
        if (count := int(row["num_logprobs"])) >= 0:
            logprobs.token_logprobs[i] = -float(hash_of([h, int(row["scored_id"])]) % 9973)
            logprobs.token_ranks[i] = 1 + h % 7
            logprobs.top_ids[i, :count] = [(h + k) % 50 for k in range(count)]
            logprobs.top_logprobs[i, :count] = [-float(k) for k in range(count)]
    return logprobs


class AtOnce:
    """The two halves of a step for a runner whose `forward` is the whole."""

    def begin(self, batch: Batch, **options: object) -> None:
        self._result = self.forward(batch, **options)

    def end(self) -> object:
        return self._result


class PagedTokenModel(AtOnce):
    """Runs batches over a cache of tokens.

    Args:
        num_blocks, block_size: of the cache.
        vocab_size: of the answers.
        before: called with each batch before it runs: to poison, or to look.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        before: Callable[[Batch], None] | None = None,
    ) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.before = before
        self.slots = np.full(num_blocks * block_size, POISON, np.int64)
        self.num_steps = 0

    def fill_blocks(self, block_ids: Sequence[int], value: int = POISON) -> None:
        self.slots.reshape(-1, self.block_size)[list(block_ids)] = POISON

    def forward(
        self, batch: Batch, sampling: SamplingBatch | None = None, wants_logits: bool = True
    ) -> Output:
        if self.before is not None:
            self.before(batch)
        self.num_steps += 1
        assert len(set(batch.slot_mapping.tolist())) == len(batch.slot_mapping), "written twice"
        for token, slot, position in zip(
            batch.input_ids, batch.slot_mapping, batch.positions, strict=True
        ):
            self.slots[slot] = (int(position) << 32) | int(token)
        hashes = []
        for index in batch.logits_indices.tolist():
            row = int(np.searchsorted(batch.cu_seqlens_q, index, "right")) - 1
            hashes.append(hash_of(self._read(batch, row, int(batch.positions[index]) + 1)))
        drawn, logprobs = hashes, None
        if sampling is not None:
            drawn = [
                drawn_from(h, row, sampling.edits[row["first_edit"] :][: row["num_edits"]])
                for h, row in zip(hashes, sampling.rows, strict=True)
            ]
            logprobs = scores(hashes, sampling)
        return Output(
            np.array(hashes, np.int64).reshape(-1, 1),
            np.array([h % self.vocab_size for h in drawn], np.int32),
            logprobs,
        )

    def _read(self, batch: Batch, row: int, length: int) -> list[int]:
        """The tokens at positions 0 .. length - 1, through the block table."""
        blocks = batch.block_tables[row][: -(-length // self.block_size)]
        kept = self.slots.reshape(-1, self.block_size)[blocks].reshape(-1)[:length].tolist()
        tokens = []
        for position, value in enumerate(kept):
            assert value != POISON, f"row {row} reads a slot that nobody has written"
            tokens.append(value & 0xFFFFFFFF if value >> 32 == position else -2)
        return tokens
