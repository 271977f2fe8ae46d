"""Decide which sequences run in the next step, and how many tokens of each.

Every running sequence is in every step: with one token when it decodes, with a chunk when it
prefills; after one token for each, the budget goes to the earliest. Sequences wait in order of
arrival (and priority) and none overtakes the head. When the pool runs dry, the last in order gives
its blocks back and computes its tokens again later. So the first in order always advances, and each
in turn becomes the first: nobody starves and nothing can deadlock.

Knows token counts and free blocks; knows nothing of text, sampling, tensors or C. Invariant: a
sequence that is not finished is either waiting, or running, or a follower of one that is.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.batch import Batch
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.errors import InvalidArgument, QueueFull
from engine.running_batch import RunningBatch
from engine.sequence import FinishReason, Sequence


@dataclass(frozen=True)
class PromptLogits:
    """A chunk of a prompt whose logits are wanted: of `count` tokens from position `start` on."""

    sequence: Sequence
    start: int
    count: int
    first_logits_row: int


@dataclass(frozen=True)
class ScheduledStep:
    """What to compute next."""

    batch: Batch
    num_new: np.ndarray  # tokens of each row of the running batch, int32 [num_seqs]
    rows: np.ndarray  # rows that get a next token, ascending [num_sampled]
    logits_rows: np.ndarray  # where the logits for those tokens are, [num_sampled]
    prompts: list[PromptLogits]


@dataclass(frozen=True)
class CommittedStep:
    """What a step brought about."""

    watched: list[tuple[Sequence, int, int]]  # (sequence, its new token, place among the sampled)
    finished: list[Sequence]


class Scheduler:
    """The waiting queue and the running batch over one pool of blocks.

    Args:
        config: room of the engine; max_num_tokens is the budget of a step.
        eos_token_ids: end a sequence that does not ignore them.
        vocab_size: token ids are below it.
        max_waiting: sequences that may wait; preempted ones are not refused.
        enable_prefix_caching: whether equal prefixes share blocks.

    Raises:
        InvalidArgument: the budget does not give each running sequence a token.
    """

    def __init__(
        self,
        config: EngineConfig,
        eos_token_ids: Iterable[int],
        vocab_size: int,
        max_waiting: int = 1 << 16,
        enable_prefix_caching: bool = True,
    ) -> None:
        if config.max_num_tokens < config.max_num_seqs:
            raise InvalidArgument(
                f"max_num_tokens must be at least max_num_seqs ({config.max_num_seqs}), "
                f"got {config.max_num_tokens}"
            )
        self.config = config
        self.max_waiting = max_waiting
        self.blocks = BlockManager(config.num_blocks, config.block_size, enable_prefix_caching)
        self.running = RunningBatch(
            config.max_num_seqs, config.max_seq_len, config.block_size, vocab_size
        )
        self.waiting: list[Sequence] = []  # in order
        self._leaders: list[Sequence] = []  # those with followers
        self._counting = np.arange(config.max_num_seqs)
        self._ones = np.ones(config.max_num_seqs, np.int32)
        self._last_decode: ScheduledStep | None = None
        # The head and the pool when it last got no blocks: not tried again until either changes.
        # With nobody running all blocks are free, where nobody is refused: so none waits for ever.
        self._refused: tuple[Sequence, int, int] | None = None
        self._is_eos = np.zeros(vocab_size, bool)
        self._is_eos[[token for token in eos_token_ids if token < vocab_size]] = True

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.waiting or self.running.sequences)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its followers join when its prompt is computed.

        Raises:
            InvalidArgument: it could not run even alone.
            QueueFull: too many wait.
        """
        config = self.config
        if sequence.max_num_tokens > config.max_seq_len:
            raise InvalidArgument(
                f"prompt and max_tokens must have at most {config.max_seq_len} tokens together "
                f"(max_seq_len), got {sequence.max_num_tokens}"
            )
        # The last token of an answer is never fed back, so it needs no slot.
        room = config.num_blocks * config.block_size
        if sequence.max_num_tokens - 1 > room:
            raise InvalidArgument(
                f"prompt and max_tokens need {sequence.max_num_tokens - 1} slots of the KV cache, "
                f"which has {room} (num_blocks {config.num_blocks})"
            )
        held_back = sum(len(leader.followers) for leader in self._leaders)
        num_waiting = len(self.waiting) + held_back + 1 + len(sequence.followers)
        if num_waiting > self.max_waiting:
            raise QueueFull(f"at most {self.max_waiting} sequences may wait, got {num_waiting}")
        insort(self.waiting, sequence, key=_order)
        if sequence.followers:
            self._leaders.append(sequence)

    def schedule(self) -> ScheduledStep | None:
        """The next step; None if nobody waits or runs."""
        running = self.running
        if not running.is_ahead:
            self._grow()
        self._admit()
        count = running.num_seqs
        if count == 0:
            return None
        if running.is_ahead:
            return self._decode_step(running.lay_out_decode())
        num_new = self._share_budget()
        computed = running.num_computed[:count]
        is_sampled = computed + num_new == running.num_tokens[:count]
        rows = None if is_sampled.all() else is_sampled.nonzero()[0]
        every = self._rows_of_prompt_logits()
        batch = running.lay_out(num_new, rows, every)
        rows = self._counting[:count] if rows is None else rows
        if not every:
            return ScheduledStep(batch, num_new, rows, self._counting[: len(rows)], [])
        ends, places = batch.cu_seqlens_q[1:], batch.logits_indices
        prompts = [
            PromptLogits(
                running.sequences[row],
                int(computed[row]),
                int(num_new[row]),
                int(np.searchsorted(places, batch.cu_seqlens_q[row])),
            )
            for row in every
        ]
        return ScheduledStep(batch, num_new, rows, np.searchsorted(places, ends[rows] - 1), prompts)

    def prepare(self, step: ScheduledStep) -> None:
        """Give blocks and slots to the step after this one, while this one is computed.

        On the guess that all rows decode on. Who ends by this step leaves with its row, who comes
        is laid out anew; where the pool runs dry, it is left to `schedule` to take blocks away.

        Args:
            step: what `schedule` returned last; not committed yet.
        """
        running = self.running
        count = running.num_seqs
        if len(step.rows) < count:
            return
        grown = (running.num_tokens[:count] >= running.grows_at[:count]).nonzero()[0].tolist()
        if len(grown) > self.blocks.num_free:
            return
        for row in grown:  # there is a block for each, whoever comes first
            self._extend(running.sequences[row])
        running.lay_ahead(step.num_new, grown)

    def commit(self, step: ScheduledStep, next_ids: np.ndarray) -> CommittedStep:
        """Take a computed step in: progress, new tokens, full blocks, and who ends.

        Args:
            step: what `schedule` returned last; nothing was added, aborted or finished since.
            next_ids: the next token of each of step.rows, int32 [num_sampled].
        """
        running, rows = self.running, step.rows
        known = running.advance(step.num_new, rows, next_ids)
        for sequence, index in running.filled_blocks():
            self.blocks.cache(sequence.block_table, index, running.block_token_ids(sequence, index))
            running.block_tables[sequence.row, index] = sequence.block_table[index]
        self._release_followers()

        index = running.index_of(rows)
        is_eos = self._is_eos.take(next_ids)
        is_eos &= known >= running.eos_counts_at[index]
        finished = []
        for place in (is_eos | (known == running.max_num_tokens[index])).nonzero()[0].tolist():
            sequence = running.sequences[rows[place]]
            sequence.finish("stop" if is_eos[place] else "length")
            finished.append(sequence)
        watched = self._watched(rows, next_ids)
        for sequence, token_id, place in watched:
            if token_id in sequence.stop_token_ids and known[place] > sequence.min_num_tokens:
                if not sequence.is_finished:
                    finished.append(sequence)
                if not is_eos[place]:
                    sequence.finish("stop", token_id)
        for sequence in finished:
            self._retire(sequence)
        return CommittedStep(watched, finished)

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """End a sequence wherever it is; of one that has ended, only the reason changes."""
        was_finished = sequence.is_finished
        sequence.finish(reason, stop_reason)
        if was_finished:
            return
        if sequence.row is not None:
            self._retire(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        for leader in self._leaders:
            if sequence in leader.followers:
                leader.followers.remove(sequence)
        if sequence in self._leaders:  # nobody is left to wait for
            self._leaders.remove(sequence)
            self._queue_followers(sequence)

    def check_integrity(self) -> None:
        """Assert every invariant of queue, rows and blocks; between steps."""
        assert self.waiting == sorted(self.waiting, key=_order), "the queue is out of order"
        everyone = [*self.waiting, *self.running.sequences]
        assert len(set(map(id, everyone))) == len(everyone), "a sequence is in two places"
        assert not any(sequence.is_finished for sequence in everyone), "finished, but still here"
        assert not any(sequence.block_table for sequence in self.waiting), "waits with blocks"
        for sequence in self.running.sequences:
            count = int(self.running.num_tokens[sequence.row])
            # The newest token may still lack its block: it is given when it is scheduled.
            least, most = (self.blocks.num_blocks_for(known) for known in (count - 1, count))
            assert least <= len(sequence.block_table) <= most, "a block too few or too many"
        self.running.check_integrity()
        self.blocks.check_integrity(s.block_table for s in self.running.sequences)

    def _grow(self) -> None:
        """A block for each row whose next token has no slot, the earliest first."""
        running = self.running
        count = running.num_seqs
        short = (running.num_tokens[:count] > running.num_slots[:count]).nonzero()[0].tolist()
        for sequence in sorted((running.sequences[row] for row in short), key=_order):
            while sequence.row is not None and not self._extend(sequence):
                self._preempt(max(running.sequences, key=_order))

    def _decode_step(self, batch: Batch) -> ScheduledStep:
        """The step of this batch, in which every row decodes; the same for the same batch."""
        if self._last_decode is None or self._last_decode.batch is not batch:
            count = self.running.num_seqs
            every = self._counting[:count]
            self._last_decode = ScheduledStep(batch, self._ones[:count], every, every, [])
        return self._last_decode

    def _extend(self, sequence: Sequence) -> bool:
        """One more block for a running sequence; False if the pool is dry."""
        if not self.blocks.append(sequence.block_table):
            return False
        self.running.add_block(sequence)
        return True

    def _admit(self) -> None:
        """Let the head of the queue run while there are seats, blocks and budget."""
        running = self.running
        while self.waiting and int(self._remaining().sum()) < self.config.max_num_tokens:
            head = self.waiting[0]
            allocation = None
            attempt = (head, self.blocks.num_free, self.blocks.num_cached)
            if running.num_seqs < self.config.max_num_seqs and attempt != self._refused:
                ids = np.array(head.token_ids, np.int32)
                allocation = self.blocks.allocate(ids, not head.wants_prompt_logits)
                self._refused = None if allocation is not None else attempt
            if allocation is None:
                victim = self._overtaken_by(head)
                if victim is None:
                    return
                self._preempt(victim)
                continue
            self.waiting.pop(0)
            head.block_table = allocation.block_table
            if head.num_preemptions == 0:
                head.num_cached_tokens = allocation.num_cached_tokens
            running.add(head, allocation.num_cached_tokens, ids)

    def _overtaken_by(self, head: Sequence) -> Sequence | None:
        """The last running sequence, if it is behind the head and of lower priority."""
        running = self.running
        if not (running.priorities[: running.num_seqs] > head.priority).any():
            return None
        last = max(running.sequences, key=_order)
        return last if last.priority > head.priority and last.order > head.order else None

    def _rows_of_prompt_logits(self) -> list[int]:
        """Rows within a prompt whose logits are all wanted."""
        if self.running.num_prompt_readers == 0:
            return []
        return [
            row
            for row, sequence in enumerate(self.running.sequences)
            if sequence.wants_prompt_logits
            and self.running.num_computed[row] < sequence.num_prompt_tokens
        ]

    def _remaining(self) -> np.ndarray:
        """Known tokens of each row that are not computed yet, at least 1, int32 [num_seqs]."""
        running = self.running
        count = running.num_seqs
        return running.num_tokens[:count] - running.num_computed[:count]

    def _share_budget(self) -> np.ndarray:
        """Tokens of each row in the next step: one, and of the surplus the earliest first."""
        remaining = self._remaining()
        surplus = self.config.max_num_tokens - len(remaining)
        if int(remaining.sum()) - len(remaining) <= surplus:
            return remaining
        num_new = np.ones_like(remaining)
        sequences = self.running.sequences
        long = (remaining > 1).nonzero()[0].tolist()
        for row in sorted(long, key=lambda row: sequences[row].order):
            extra = min(int(remaining[row]) - 1, surplus)
            num_new[row] += extra
            surplus -= extra
        return num_new

    def _release_followers(self) -> None:
        """Queue those whose prompt is computed now."""
        for leader in list(self._leaders):
            row = leader.row
            if row is not None and self.running.num_computed[row] >= leader.num_prompt_tokens:
                self._leaders.remove(leader)
                self._queue_followers(leader)

    def _queue_followers(self, leader: Sequence) -> None:
        for follower in leader.followers:
            insort(self.waiting, follower, key=_order)
        leader.followers = []

    def _watched(self, rows: np.ndarray, next_ids: np.ndarray) -> list[tuple[Sequence, int, int]]:
        """The sampled sequences whose tokens somebody wants to see."""
        sequences = self.running.sequences
        if self.running.num_watched == 0:
            return []
        return [
            (sequences[row], token_id, place)
            for place, (row, token_id) in enumerate(
                zip(rows.tolist(), next_ids.tolist(), strict=True)
            )
            if sequences[row].is_watched
        ]

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it computes its tokens again when its turn comes."""
        self._leave(sequence)
        sequence.num_preemptions += 1
        insort(self.waiting, sequence, key=_order)

    def _retire(self, sequence: Sequence) -> None:
        if sequence.row is not None:
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence.block_table)


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
