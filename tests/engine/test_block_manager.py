"""The block manager against a dictionary of what each block holds, and its edges one by one."""

from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import engine.block_manager
from engine.block_manager import NO_PREFIX, BlockManager
from engine.errors import InvalidArgument

B = 4  # tokens per block


class CollidingKey(NamedTuple):
    """As `PrefixKey`, but all keys have one hash."""

    parent: int
    token_ids: bytes

    def __hash__(self) -> int:
        return 7


def compute(manager: BlockManager, table: list[int], tokens: list[int]) -> None:
    """Declare every full block of a table that has been computed."""
    for index in range(len(tokens) // B):
        manager.cache(table, index, tokens[index * B : (index + 1) * B])


def owned(manager: BlockManager, tokens: list[int]) -> list[int]:
    allocation = manager.allocate(tokens)
    assert allocation is not None
    compute(manager, allocation.block_table, tokens)
    return allocation.block_table


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(1, 1), (B - 1, 1), (B, 1), (B + 1, 2), (2 * B, 2)]
)
def test_blocks_cover_the_tokens_and_no_more(num_tokens: int, num_blocks: int):
    manager = BlockManager(8, B)

    allocation = manager.allocate(range(num_tokens))

    assert len(allocation.block_table) == num_blocks
    assert allocation.num_cached_tokens == 0
    assert manager.num_free == 8 - num_blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_an_empty_pool_is_refused(num_blocks: int, block_size: int):
    with pytest.raises(InvalidArgument, match=f"got {num_blocks} and {block_size}"):
        BlockManager(num_blocks, block_size)


def test_a_pool_too_small_gives_nothing_and_changes_nothing():
    manager = BlockManager(3, B)
    table = owned(manager, list(range(2 * B)))

    assert manager.allocate([9] * (B + 1)) is None
    assert manager.num_free == 1
    manager.check_integrity([table])


@pytest.mark.parametrize(
    ("length", "num_cached"),
    [(B, 0), (B + 1, B), (2 * B, B), (2 * B + 1, 2 * B), (3 * B, 2 * B), (3 * B + 1, 2 * B)],
)
def test_a_prefix_is_shared_but_the_last_token_is_always_computed(length: int, num_cached: int):
    # the cache holds positions 0 .. 2B - 1 and a partial third block
    manager = BlockManager(12, B)
    tokens = list(range(100, 100 + 4 * B))
    first = owned(manager, tokens[: 2 * B + 1])

    allocation = manager.allocate(tokens[:length])

    assert allocation.num_cached_tokens == num_cached
    assert allocation.block_table[: num_cached // B] == first[: num_cached // B]
    manager.check_integrity([first, allocation.block_table])


def test_a_block_is_found_after_its_owner_has_gone():
    manager = BlockManager(8, B)
    tokens = list(range(2 * B + 1))
    table = owned(manager, tokens)
    kept = list(table)
    manager.free(table)

    again = manager.allocate(tokens)

    assert table == []
    assert again.block_table[:2] == kept[:2]
    assert again.num_cached_tokens == 2 * B


def test_equal_tokens_behind_different_prefixes_are_different_blocks():
    manager = BlockManager(8, B)
    table = owned(manager, [1] * B + [5] * B)

    allocation = manager.allocate([2] * B + [5] * B + [0])

    assert allocation.num_cached_tokens == 0
    assert not set(allocation.block_table) & set(table)


def test_a_shared_block_lives_as_long_as_its_last_owner():
    manager = BlockManager(8, B)
    tokens = list(range(B + 1))
    first, second = owned(manager, tokens), owned(manager, tokens)
    assert first[0] == second[0]

    manager.free(first)

    manager.check_integrity([second])
    assert manager.num_free == 8 - 2


def test_a_block_computed_twice_is_kept_once():
    manager = BlockManager(8, B)
    tokens = list(range(2 * B + 1))
    tables = [manager.allocate(tokens).block_table for _ in range(2)]
    assert not set(tables[0]) & set(tables[1])

    for table in tables:
        compute(manager, table, tokens)

    assert tables[0][:2] == tables[1][:2]
    assert manager.num_free == 8 - 4
    manager.check_integrity(tables)


def test_the_least_recently_used_block_goes_first_and_the_end_of_a_prefix_before_its_start():
    manager = BlockManager(4, B)
    old, young = list(range(2 * B)), list(range(50, 50 + 2 * B))
    tables = [owned(manager, old), owned(manager, young)]
    for table in tables:
        manager.free(table)

    manager.allocate([9])  # one block: the end of `old` goes

    assert len(manager._match([*old, 0])) == 1
    assert len(manager._match([*young, 0])) == 2


def test_an_evicted_block_is_not_found_again():
    manager = BlockManager(2, B)
    tokens = list(range(B + 1))
    manager.free(owned(manager, tokens))
    other = owned(manager, [9] * (B + 1))
    manager.free(other)

    assert manager.allocate(tokens).num_cached_tokens == 0


def test_a_block_without_content_goes_before_a_cached_one():
    manager = BlockManager(3, B)
    tokens = list(range(B + 1))
    manager.free(owned(manager, tokens))  # one cached, one partial

    manager.allocate([9] * (2 * B))

    assert len(manager._match(tokens)) == 1


def test_without_prefix_caching_nothing_is_shared():
    manager = BlockManager(8, B, enable_prefix_caching=False)
    tokens = list(range(B + 1))
    first, second = owned(manager, tokens), owned(manager, tokens)

    assert not set(first) & set(second)
    assert manager.num_cached == 0


def test_a_request_may_decline_the_cache():
    manager = BlockManager(8, B)
    tokens = list(range(B + 1))
    owned(manager, tokens)

    assert manager.allocate(tokens, use_cache=False).num_cached_tokens == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda m, table: m._ref_counts.__setitem__(table[0], 2),
        lambda m, table: m._free.pop(next(iter(m._free))),
        lambda m, table: m._free.__setitem__(table[0], None),
        lambda m, table: m._keys.__setitem__(table[0], None),
        lambda m, table: m._cached.clear(),
        lambda m, table: m._content_ids.__setitem__(table[1], m._content_ids[table[0]]),
        lambda m, table: table.append(table[0]),
        lambda m, table: table.pop(),
        lambda m, table: table.reverse(),
    ],
)
def test_the_integrity_check_notices_damage(damage):
    manager = BlockManager(8, B)
    table = owned(manager, list(range(3 * B)))
    manager.check_integrity([table])

    damage(manager, table)

    with pytest.raises(AssertionError):
        manager.check_integrity([table])


def test_the_integrity_check_notices_a_prefix_that_would_be_evicted_too_early():
    manager = BlockManager(8, B)
    manager.free(owned(manager, list(range(2 * B))))

    first = next(block for key, block in manager._cached.items() if key.parent == NO_PREFIX)
    manager._free.move_to_end(first, last=False)

    with pytest.raises(AssertionError, match="too early"):
        manager.check_integrity([])


class Pool(RuleBasedStateMachine):
    """Random owners over a small pool; `content` says what each block really holds."""

    key: type = engine.block_manager.PrefixKey
    NUM_BLOCKS = 6

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(engine.block_manager, "PrefixKey", self.key)
        self.manager = BlockManager(self.NUM_BLOCKS, B)
        self.owners: list[tuple[list[int], list[int], int]] = []  # tokens, table, num_computed
        # The model: the whole prefix up to and with each block's tokens, None where poisoned.
        self.content: dict[int, list[int] | None] = dict.fromkeys(range(self.NUM_BLOCKS))

    def teardown(self) -> None:
        for _, table, _ in self.owners:
            self.manager.free(table)
        self.manager.check_integrity([])
        assert self.manager.num_free == self.NUM_BLOCKS
        self.patch.undo()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5 * B))
    def add(self, tokens: list[int]) -> None:
        free = self.manager.num_free
        allocation = self.manager.allocate(tokens)
        if allocation is None:
            assert self.manager.num_blocks_for(len(tokens)) > 0
            assert self.manager.num_free == free
            return
        table, cached = allocation.block_table, allocation.num_cached_tokens
        assert cached < len(tokens)
        for index in range(cached // B):
            assert self.content[table[index]] == tokens[: (index + 1) * B], "somebody else's block"
        for block in table[cached // B :]:
            assert not any(block in other for _, other, _ in self.owners), "two owners"
            self.content[block] = None
        self.owners.append((tokens, table, cached))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def compute_some(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.owners) - 1))
        tokens, table, computed = self.owners[i]
        until = data.draw(st.integers(computed, len(tokens)))
        for index in range(computed // B, until // B):
            self.content[table[index]] = tokens[: (index + 1) * B]
            before = table[index]
            self.manager.cache(table, index, tokens[index * B : (index + 1) * B])
            assert self.content[table[index]] == tokens[: (index + 1) * B], "not the same content"
            assert table[index] == before or self.content[before] == self.content[table[index]]
        self.owners[i] = (tokens, table, until)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), token=st.integers(0, 1))
    def extend(self, data: st.DataObject, token: int) -> None:
        i = data.draw(st.integers(0, len(self.owners) - 1))
        tokens, table, computed = self.owners[i]
        tokens = [*tokens, token]
        if len(tokens) > len(table) * B:
            if not self.manager.append(table):
                assert self.manager.num_free == 0
                return
            assert not any(table[-1] in other for _, other, _ in self.owners if other is not table)
            self.content[table[-1]] = None
        self.owners[i] = (tokens, table, computed)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        _, table, _ = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.manager.free(table)

    @invariant()
    def everything_agrees(self) -> None:
        self.manager.check_integrity(table for _, table, _ in self.owners)
        for tokens, table, computed in self.owners:
            for index in range(computed // B):
                assert self.content[table[index]] == tokens[: (index + 1) * B], "overwritten"


class PoolOfCollisions(Pool):
    """The same, and every hash is the same."""

    key = CollidingKey


MACHINE = settings(max_examples=60, stateful_step_count=40)
TestPool = Pool.TestCase
TestPool.settings = MACHINE
TestPoolOfCollisions = PoolOfCollisions.TestCase
TestPoolOfCollisions.settings = MACHINE


@pytest.mark.slow
@pytest.mark.deep
class TestPoolDeeply(PoolOfCollisions.TestCase):
    settings = settings(max_examples=2000, stateful_step_count=60)


def test_colliding_keys_collide():
    assert hash(CollidingKey(0, b"1")) == hash(CollidingKey(3, b"2"))
    assert CollidingKey(0, b"1") != CollidingKey(0, b"2")
