"""Every interleaving of a few requests over a few blocks: no leak, no double owner, no deadlock.

The explorer walks all orders of add, step, abort and finish from the empty engine, merging states
that look alike; after every move all invariants hold, and from every state reached, steps alone end
every request. What a model would answer is irrelevant here: whether a token ends its request is one
more choice of the explorer.
"""

from collections import deque
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.scheduler import Scheduler
from engine.sequence import Sequence

B = 16
EOS, TOKEN = 1, 2
Move = tuple[str, int]


@dataclass(frozen=True)
class Scope:
    """What is explored.

    Args:
        lengths: (prompt, longest answer) of each request.
        num_blocks, max_num_seqs, budget: of the engine.
        is_shared: equal prompts, so that prefixes are shared.
        followers: answers of the first request beyond its first.
        priorities: of each request.
        is_async: whether the next step is prepared while one is computed.
    """

    lengths: tuple[tuple[int, int], ...]
    num_blocks: int = 4
    max_num_seqs: int = 3
    budget: int = 32
    is_shared: bool = True
    followers: int = 0
    priorities: tuple[int, ...] = (0, 0, 0)
    is_async: bool = True  # the next step is prepared while one is computed


class Explorer:
    """The states reached so far, each with the moves that led to it."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.num_moves = 0
        self.num_preempted = 0
        self.num_hits = 0
        self.num_ahead = 0

    def start(self) -> tuple[Scheduler, list[Sequence]]:
        scope = self.scope
        config = EngineConfig(
            device="cpu",
            block_size=B,
            num_blocks=scope.num_blocks,
            max_seq_len=B * scope.num_blocks,
            max_num_tokens=scope.budget,
            max_num_seqs=scope.max_num_seqs,
        )
        sequences = []
        for name, (length, answer) in enumerate(scope.lengths):
            token = 7 if scope.is_shared else 10 + name
            sequences.append(
                Sequence(
                    f"r{name}",
                    [token] * length,
                    length + answer,
                    arrival=name,
                    priority=scope.priorities[name],
                )
            )
        leader = sequences[0]
        leader.followers = [
            Sequence("r0", list(leader.token_ids), leader.max_num_tokens, index=i + 1)
            for i in range(scope.followers)
        ]
        return Scheduler(config, [EOS], 100), [*sequences, *leader.followers]

    def moves(self, scheduler: Scheduler, sequences: list[Sequence], added: int) -> list[Move]:
        """What may happen next: `added` says how many requests have come."""
        num_requests = len(self.scope.lengths)
        found: list[Move] = [("add", added)] if added < num_requests else []
        if scheduler.has_work:
            # every subset of the sampled rows may end: no bit, each bit, all bits
            rows = max(1, scheduler.running.num_seqs)
            found += [("step", 0)] + [("step", 1 << row) for row in range(rows)]
            found += [("step", (1 << rows) - 1)] if rows > 1 else []
        here = {i for i, s in enumerate(sequences[:num_requests]) if i < added}
        here |= set(range(num_requests, len(sequences))) if added else set()
        found += [("abort", i) for i in sorted(here) if not sequences[i].is_finished]
        return found

    def make(self, state: tuple, move: Move) -> tuple:
        scheduler, sequences, added = deepcopy(state)
        kind, which = move
        if kind == "add":
            scheduler.add(sequences[added])
            added += 1
        elif kind == "abort":
            scheduler.finish(sequences[which], "abort")
        else:
            self._step(scheduler, which)
        scheduler.check_integrity()
        self.num_moves += 1
        return scheduler, sequences, added

    def explore(self) -> int:
        """Visit everything; returns the number of states.

        Raises:
            AssertionError: an invariant fails, or from some state a request never ends.
        """
        first = (*self.start(), 0)
        seen = {picture(first)}
        queue = deque([first])
        while queue:
            state = queue.popleft()
            scheduler, sequences, added = state
            if added == len(self.scope.lengths):
                self._ends(state)
            self.num_preempted += sum(s.num_preemptions > 0 for s in sequences)
            self.num_hits += sum(s.num_cached_tokens > 0 for s in sequences)
            for move in self.moves(scheduler, sequences, added):
                following = self.make(state, move)
                key = picture(following)
                if key not in seen:
                    seen.add(key)
                    queue.append(following)
        return len(seen)

    def _step(self, scheduler: Scheduler, ending: int) -> None:
        """One step; the rows whose bit is set get an end token."""
        self.num_ahead += scheduler.running.is_ahead
        planned = scheduler.schedule()
        assert planned is not None, "there is work, but nothing is scheduled"
        if self.scope.is_async:
            scheduler.prepare(planned)
        tokens = [EOS if ending >> row & 1 else TOKEN for row in planned.rows.tolist()]
        scheduler.commit(planned, np.array(tokens, np.int32))

    def _ends(self, state: tuple) -> None:
        """Steps in which nothing stops early end every request, and nothing is left behind."""
        scheduler, sequences, _ = deepcopy(state)
        work = sum(length + answer for length, answer in self.scope.lengths)
        for _ in range(20 * work):
            if not scheduler.has_work:
                break
            self._step(scheduler, 0)
        assert all(sequence.is_finished for sequence in sequences), "a request never ends"
        assert scheduler.blocks.num_free == self.scope.num_blocks, "a block leaked"


def picture(state: tuple) -> tuple:
    """All that decides what can still happen; names of blocks do not."""
    scheduler, sequences, added = state
    manager, running = scheduler.blocks, scheduler.running
    names: dict[int, int] = {}
    prefixes = {}  # content id -> all tokens up to the block's end; parents are older
    for key, block in sorted(manager._cached.items(), key=lambda i: manager._content_ids[i[1]]):
        prefix = prefixes.get(key.parent, b"") + key.token_ids
        prefixes[manager._content_ids[block]] = prefix

    def look(block: int) -> tuple:
        name = names.setdefault(block, len(names))
        return name, manager._ref_counts[block], prefixes.get(manager._content_ids[block])

    parts = []
    for sequence in sequences:
        row = sequence.row
        where: object = "gone" if sequence.is_finished else tuple(sequence.token_ids)
        if row is not None:
            where = (row, tuple(running.tokens(sequence)), int(running.num_computed[row]))
        parts.append((where, tuple(look(block) for block in sequence.block_table)))
    free = tuple(prefixes.get(manager._content_ids[block]) for block in manager._free)
    waiting = tuple(sequence.order for sequence in scheduler.waiting)
    refused = scheduler._refused and (scheduler._refused[0].order, *scheduler._refused[1:])
    return tuple(parts), free, waiting, refused, running.is_ahead, added


SCOPES = {
    "two that share": Scope(((17, 4), (17, 4))),
    "three that cross a block": Scope(((15, 4), (16, 3), (14, 4)), num_blocks=3),
    "three strangers in a pool for two": Scope(
        ((15, 3), (15, 3), (15, 3)), num_blocks=3, is_shared=False
    ),
    "chunks": Scope(((20, 2), (18, 3), (3, 4)), budget=8),
    "followers": Scope(((17, 3), (15, 3)), followers=1),
    "priorities": Scope(((15, 4), (15, 4)), num_blocks=2, max_num_seqs=1, priorities=(1, 0)),
    "three and four blocks": Scope(((17, 4), (15, 4), (30, 5)), num_blocks=4),
    "three of three priorities": Scope(
        ((15, 4), (15, 4), (15, 4)), num_blocks=3, max_num_seqs=2, priorities=(2, 1, 0)
    ),
    "three followers": Scope(((15, 4), (15, 4)), num_blocks=4, followers=2),
    "three in chunks": Scope(((30, 4), (33, 3), (15, 4)), budget=12),
}
DEEP = {
    "three that grow over several blocks": Scope(((10, 24), (12, 22), (14, 20)), num_blocks=4),
    "three strangers that do": Scope(
        ((10, 24), (12, 22), (14, 20)), num_blocks=4, budget=12, is_shared=False
    ),
    "three of three priorities for long": Scope(
        ((15, 18), (14, 18), (13, 18)), num_blocks=4, max_num_seqs=2, priorities=(2, 1, 0)
    ),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["one by one", "prepared ahead"])
@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_every_interleaving_keeps_every_promise(scope: Scope, is_async: bool):
    explorer = Explorer(replace(scope, is_async=is_async))

    num_states = explorer.explore()

    print(f"{num_states} states, {explorer.num_moves} moves")
    assert num_states > 10
    assert (explorer.num_ahead > 0) == is_async


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.parametrize("scope", DEEP.values(), ids=DEEP)
def test_every_interleaving_of_more(scope: Scope):
    explorer = Explorer(scope)

    num_states = explorer.explore()

    print(f"{num_states} states, {explorer.num_moves} moves")
    assert num_states > 1000


def test_the_scopes_reach_preemption_and_shared_prefixes():
    explorers = [Explorer(scope) for scope in list(SCOPES.values())[:3]]
    for explorer in explorers:
        explorer.explore()

    assert sum(explorer.num_preempted for explorer in explorers) > 0
    assert sum(explorer.num_hits for explorer in explorers) > 0


class TestTheExplorer:
    """It must fail where a promise is broken."""

    SCOPE = replace(SCOPES["three strangers in a pool for two"])

    def test_notices_a_leak(self, monkeypatch):
        monkeypatch.setattr(Scheduler, "_leave", lambda self, s: self.running.remove(s))

        with pytest.raises(AssertionError):
            Explorer(self.SCOPE).explore()

    def test_notices_a_deadlock(self, monkeypatch):
        # A waiting request that wants one block more than there is never starts.
        monkeypatch.setattr(Scheduler, "_admit", _admit_only_with_a_block_to_spare)

        with pytest.raises(AssertionError, match="nothing is scheduled|never ends"):
            Explorer(replace(self.SCOPE, num_blocks=2)).explore()

    def test_notices_a_sequence_in_two_places(self, monkeypatch):
        finish = Scheduler.finish

        def careless(self, sequence, reason, stop_reason=None):
            finish(self, sequence, reason, stop_reason)
            if reason == "abort" and sequence not in self.waiting:
                self.waiting.append(sequence)

        monkeypatch.setattr(Scheduler, "finish", careless)

        with pytest.raises(AssertionError):
            Explorer(self.SCOPE).explore()


_admit = Scheduler._admit


def _admit_only_with_a_block_to_spare(self: Scheduler) -> None:
    if self.waiting:
        needed = self.blocks.num_blocks_for(len(self.waiting[0].token_ids) + B)
        if needed + 1 > self.blocks.num_free:
            return
    _admit(self)
