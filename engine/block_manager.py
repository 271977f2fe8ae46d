"""Decide which KV blocks hold which tokens: give them out, share, cache, evict and take them back.

Knows block ids, reference counts and token ids; knows nothing of sequences, steps, tensors or C.
Only full blocks whose tokens are all computed are ever shared, and nobody writes to those: so a
shared block is never copied. A cached block is found by its tokens and the identity of the block
before it, compared in full: no hash decides what is equal. A block that falls free keeps its
content until it is given out again, the least recently used first and a block before its prefix.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.errors import InvalidArgument

NO_PREFIX = 0  # the parent of a first block
BYTES_PER_ID = 4

Items = Sequence[int] | np.ndarray


class PrefixKey(NamedTuple):
    """What a cached block is found by: equal keys mean equal tokens from position 0 on."""

    parent: int  # content id of the block before it, or NO_PREFIX
    token_ids: bytes  # all of the block's, int32: compared at once, and hashed once


@dataclass(frozen=True)
class Allocation:
    """The blocks of one sequence, and how many of its first tokens they hold already."""

    block_table: list[int]
    num_cached_tokens: int


class BlockManager:
    """The pool of KV blocks.

    Args:
        num_blocks: blocks of the pool.
        block_size: tokens per block.
        enable_prefix_caching: whether equal prefixes share blocks.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise InvalidArgument(
                f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._keys: list[PrefixKey | None] = [None] * num_blocks  # of cached blocks
        self._content_ids = [NO_PREFIX] * num_blocks  # of cached blocks; never used twice
        self._last_content_id = NO_PREFIX
        self._cached: dict[PrefixKey, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner; some may be cached."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their tokens."""
        return len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, token_ids: Items, use_cache: bool = True) -> Allocation | None:
        """Blocks for all these tokens, the longest cached prefix among them.

        The last token is never taken from the cache: its logits are yet to be computed.

        Returns:
            None if the pool cannot give them; then nothing has changed.
        """
        hits = self._match(token_ids) if use_cache and self.enable_prefix_caching else []
        num_others = self.num_blocks_for(len(token_ids)) - len(hits)
        if num_others > len(self._free) - sum(self._ref_counts[block] == 0 for block in hits):
            return None
        for block in hits:
            self._share(block)
        table = hits + [self._take() for _ in range(num_others)]
        return Allocation(table, len(hits) * self.block_size)

    def append(self, block_table: list[int]) -> bool:
        """Add one block to a table; False if the pool is dry."""
        if not self._free:
            return False
        block_table.append(self._take())
        return True

    def cache(self, block_table: list[int], index: int, token_ids: Items) -> None:
        """Declare block `index` of a table full and computed, so that others may share it.

        Where a block of the same content is cached already, it takes this one's place in the table:
        the bits are the same. Blocks of a table are declared in order, each once.

        Args:
            block_table: may be changed at `index`.
            index: position in the table.
            token_ids: the block's tokens, [block_size].
        """
        if not self.enable_prefix_caching:
            return
        assert len(token_ids) == self.block_size, "only full blocks are cached"
        parent = self._content_ids[block_table[index - 1]] if index else NO_PREFIX
        assert index == 0 or parent != NO_PREFIX, "blocks are cached in order"
        key = PrefixKey(parent, np.asarray(token_ids, np.int32).tobytes())
        block = block_table[index]
        twin = self._cached.get(key)
        if twin is None:
            self._last_content_id += 1
            self._cached[key] = block
            self._keys[block], self._content_ids[block] = key, self._last_content_id
        elif twin != block:
            self._share(twin)
            block_table[index] = twin
            self._release(block)

    def free(self, block_table: list[int]) -> None:
        """Take a table's blocks back and empty it; the last block is the first to be evicted."""
        for block in reversed(block_table):
            self._release(block)
        block_table.clear()

    def dead_blocks(self) -> list[int]:
        """Blocks that nobody owns and nobody can find: their content means nothing."""
        return [block for block in self._free if self._keys[block] is None]

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given all tables that are in use."""
        counts = [0] * self.num_blocks
        for table in block_tables:
            assert len(set(table)) == len(table), f"a block is twice in table {table}"
            for index, block in enumerate(table):
                counts[block] += 1
                key = self._keys[block]
                before = self._content_ids[table[index - 1]] if index else NO_PREFIX
                assert key is None or key.parent == before, f"block {block} follows another prefix"
        assert counts == self._ref_counts, "reference counts are not those of the tables"
        free = {block for block, count in enumerate(counts) if count == 0}
        assert free == set(self._free), "free blocks are not those without an owner"
        for block, (count, key) in enumerate(zip(counts, self._keys, strict=True)):
            assert count < 2 or key is not None, f"block {block} is shared but not full"
            assert (key is None) == (self._content_ids[block] == NO_PREFIX)
            assert key is None or self._cached.get(key) == block, f"block {block} cannot be found"
        assert len(self._cached) == sum(key is not None for key in self._keys)
        self._check_prefixes()

    def _check_prefixes(self) -> None:
        """A cached block's prefix is cached, owned if the block is, and evicted after it."""
        by_content = {self._content_ids[block]: block for block in self._cached.values()}
        assert len(by_content) == len(self._cached), "a content id is used twice"
        place = {block: i for i, block in enumerate(self._free)}
        for key, block in self._cached.items():
            assert len(key.token_ids) == self.block_size * BYTES_PER_ID
            if key.parent == NO_PREFIX:
                continue
            parent = by_content.get(key.parent)
            assert parent is not None, f"block {block} outlives its prefix"
            if parent in place:
                assert block in place and place[block] < place[parent], f"{parent} goes too early"

    def _match(self, token_ids: Items) -> list[int]:
        """The cached blocks of the longest prefix that leaves at least one token."""
        hits: list[int] = []
        parent = NO_PREFIX
        ids = np.asarray(token_ids, np.int32)
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            key = PrefixKey(parent, ids[start : start + self.block_size].tobytes())
            block = self._cached.get(key)
            if block is None:
                break
            hits.append(block)
            parent = self._content_ids[block]
        return hits

    def _share(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def _take(self) -> int:
        """A free block for one owner; what it cached is forgotten."""
        block, _ = self._free.popitem(last=False)
        key = self._keys[block]
        if key is not None:
            del self._cached[key]
            self._keys[block], self._content_ids[block] = None, NO_PREFIX
        self._ref_counts[block] = 1
        return block

    def _release(self, block: int) -> None:
        assert self._ref_counts[block] > 0, f"block {block} has no owner"
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free[block] = None
            if self._keys[block] is None:
                self._free.move_to_end(block, last=False)  # nothing to lose: the first to go
