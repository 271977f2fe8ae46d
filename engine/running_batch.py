"""The running sequences as arrays, a row each, updated in place from step to step.

Lays out each step's index arrays without a loop over sequences: at 256 of them the host's work is a
few array operations; a step in which all decode as before is laid out as views that were made once.
Decides nothing. Invariant: rows 0 .. num_seqs - 1 are in use, and every array's row i is about
`sequences[i]`.
"""

import numpy as np

from engine.batch import Batch
from engine.edit_table import EditTable
from engine.sampling import ROW, IgnoredRow, SamplingBatch, most_logprobs
from engine.sequence import Sequence

FIRST_WIDTH = 8  # columns of block tables; they double where the longest sequence needs more
NEVER = np.iinfo(np.int32).max  # tokens that no sequence has


class RunningBatch:
    """Rows for up to max_num_seqs sequences of up to max_seq_len tokens below vocab_size."""

    def __init__(
        self, max_num_seqs: int, max_seq_len: int, block_size: int, vocab_size: int
    ) -> None:
        assert block_size & (block_size - 1) == 0, "slots are made by shifting"
        self.block_size = block_size
        self._block_shift, self._block_mask = block_size.bit_length() - 1, block_size - 1
        self.sequences: list[Sequence] = []
        self.num_watched = 0
        self.num_prompt_readers = 0  # those that want prompt logits
        self.num_sampled = 0  # those whose arg-max is not all that is asked
        self._max_blocks = -(-max_seq_len // block_size)
        self.token_ids = np.zeros((max_num_seqs, max_seq_len), np.int32)
        self.num_tokens = np.zeros(max_num_seqs, np.int32)  # known: prompt and answer so far
        self.num_computed = np.zeros(max_num_seqs, np.int32)  # in the cache
        self.num_slots = np.zeros(max_num_seqs, np.int32)  # tokens that the blocks hold
        self.grows_at = np.zeros(max_num_seqs, np.int32)  # tokens from which one more needs a block
        self.fills_at = np.zeros(max_num_seqs, np.int32)  # computed tokens that fill another block
        self.max_num_tokens = np.zeros(max_num_seqs, np.int32)
        self.eos_counts_at = np.zeros(max_num_seqs, np.int32)  # tokens from which an end token ends
        self.priorities = np.zeros(max_num_seqs, np.int32)
        self.samplers = np.zeros(max_num_seqs, ROW)
        self.newest_ids = np.zeros(max_num_seqs, np.int32)  # each row's last sampled token
        self.next_slots = np.zeros(max_num_seqs, np.int32)  # for it, where `is_ahead`
        arrays = [array for array in vars(self).values() if isinstance(array, np.ndarray)]
        self._arrays = [array for array in arrays if array.ndim == 1]  # one value per row
        self._edits = EditTable(self.samplers, vocab_size)
        self._positions = self.samplers["position"]
        self._flat_ids = self.token_ids.reshape(-1)
        self._id_starts = np.arange(0, self.token_ids.size, max_seq_len)
        self._counting = np.arange(max_num_seqs + 1, dtype=np.int32)
        self.block_tables = np.zeros((max_num_seqs, 0), np.int32)
        self._set_width(1)
        self._num_steps = 0  # committed
        self._ahead_of: int | None = None  # the value of _num_steps at which next_slots hold
        # Of a step in which every row decodes; the same while no row comes or goes.
        self._decode_batch: Batch | None = None
        self._decode_sampling: SamplingBatch | None = None

    @property
    def num_seqs(self) -> int:
        """Rows in use."""
        return len(self.sequences)

    def add(
        self, sequence: Sequence, num_computed: int, token_ids: np.ndarray | None = None
    ) -> None:
        """Give a sequence the next row; its block table covers all its tokens.

        Args:
            sequence: waits no more.
            num_computed: of its tokens, in the cache already.
            token_ids: its tokens as an array, where one is at hand.
        """
        row = sequence.row = self.num_seqs
        self.sequences.append(sequence)
        self._forget_views()
        ids = sequence.token_ids if token_ids is None else token_ids
        self.token_ids[row, : len(ids)] = ids
        self.num_tokens[row] = len(sequence.token_ids)
        self.num_computed[row] = num_computed
        self.fills_at[row] = num_computed - num_computed % self.block_size + self.block_size
        self.max_num_tokens[row] = sequence.max_num_tokens
        self.eos_counts_at[row] = NEVER if sequence.ignore_eos else sequence.min_num_tokens + 1
        self.priorities[row] = sequence.priority
        self.num_watched += sequence.is_watched
        self.num_prompt_readers += sequence.wants_prompt_logits
        self.num_sampled += sequence.is_sampled
        sampler = sequence.sampler
        self.samplers[row] = np.frombuffer((sampler or IgnoredRow).row, ROW)[0]
        if sampler is not None and sequence.is_edited:
            for token_id in sequence.token_ids[sampler.position :]:  # of its last run
                sampler.append(token_id)
            self._edits.put(row, sampler)
        if len(sequence.block_table) > self.block_tables.shape[1]:
            self._set_width(len(sequence.block_table))
        self.block_tables[row, : len(sequence.block_table)] = sequence.block_table
        self._count_slots(sequence)
        self._ahead_of = None  # it has no slot yet

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, its tokens back into its list; the last row fills the gap."""
        row = sequence.row
        assert row is not None and self.sequences[row] is sequence, "the row is somebody else's"
        sequence.token_ids = self.tokens(sequence)
        self.num_watched -= sequence.is_watched
        self.num_prompt_readers -= sequence.wants_prompt_logits
        self.num_sampled -= sequence.is_sampled
        self._edits.remove(row)
        last = self.sequences.pop()
        self._forget_views()
        if last is not sequence:
            for array in self._arrays:
                array[row] = array[last.row]
            # Only what is in use: a row may have room for 131,072 tokens.
            for table, used in (
                (self.token_ids, self.num_tokens[last.row]),
                (self.block_tables, len(last.block_table)),
            ):
                table[row, :used] = table[last.row, :used]
            self._edits.move(last.row, row)
            self.sequences[row] = last
            last.row = row
        sequence.row = None
        width = self.block_tables.shape[1]
        if width > FIRST_WIDTH and 2 * len(sequence.block_table) > width:  # it may have been alone
            most_slots = int(self.num_slots[: self.num_seqs].max(initial=1))
            if 2 * most_slots <= width * self.block_size:
                self._set_width(most_slots >> self._block_shift)

    def tokens(self, sequence: Sequence) -> list[int]:
        """All tokens of a running sequence."""
        return self.token_ids[sequence.row, : self.num_tokens[sequence.row]].tolist()

    def add_block(self, sequence: Sequence) -> None:
        """Take over the last block of a sequence's table, which is new."""
        last = len(sequence.block_table) - 1
        if last == self.block_tables.shape[1]:
            self._set_width(last + 1)
        self.block_tables[sequence.row, last] = sequence.block_table[last]
        self._count_slots(sequence)

    def _count_slots(self, sequence: Sequence) -> None:
        slots = len(sequence.block_table) * self.block_size
        self.num_slots[sequence.row] = slots
        is_enough = slots + 1 >= sequence.max_num_tokens  # its last token needs no slot
        self.grows_at[sequence.row] = NEVER if is_enough else slots

    @property
    def is_ahead(self) -> bool:
        """Whether every row decodes next, and has its slot."""
        return self._ahead_of == self._num_steps

    def lay_ahead(self, num_new: np.ndarray, grown: list[int]) -> None:
        """Slots for the step after the next commit, in which all rows decode.

        Args:
            num_new: tokens per row of the step that is being computed, int32 [num_seqs].
            grown: rows that were given a block for it.
        """
        count, is_next = self.num_seqs, self.is_ahead
        self._ahead_of = None  # until all are there, whatever interrupts this
        if is_next:  # the next slot is beside the last, or begins a block
            self.next_slots[:count] += 1
            for row in grown:
                self.next_slots[row] = self.sequences[row].block_table[-1] * self.block_size
        else:
            positions = self.num_computed[:count] + num_new
            self._slots(self._table_starts[:count], positions, out=self.next_slots[:count])
        self._ahead_of = self._num_steps + 1

    def advance(self, num_new: np.ndarray, rows: np.ndarray, next_ids: np.ndarray) -> np.ndarray:
        """Take in a computed step: its tokens per row, and the next token of the sampled rows.

        Returns:
            Known tokens of each sampled row, int32 [num_sampled].
        """
        self._num_steps += 1
        self.num_computed[: self.num_seqs] += num_new
        index = self.index_of(rows)
        # One flat index takes half the time of two.
        self._flat_ids[self._id_starts[index] + self.num_tokens[index]] = next_ids
        self.newest_ids[index] = next_ids
        self.num_tokens[index] += 1
        self._edits.note(rows, next_ids, self.num_tokens)
        return self.num_tokens[index]

    def index_of(self, rows: np.ndarray) -> np.ndarray | slice:
        """What picks these rows, ascending, from an array; of all of them, a view."""
        return slice(self.num_seqs) if len(rows) == self.num_seqs else rows

    def lay_out_decode(self) -> Batch:
        """The index arrays of a step in which every row decodes and has its slot: `is_ahead`.

        They are views of arrays that the next commit changes: the same batch, while no row comes
        or goes and the tables are wide enough.
        """
        if self._decode_batch is None:
            count = self.num_seqs
            self._decode_batch = Batch(
                input_ids=self.newest_ids[:count],
                positions=self.num_computed[:count],
                slot_mapping=self.next_slots[:count],
                cu_seqlens_q=self._counting[: count + 1],
                seq_lens=self.num_tokens[:count],
                block_tables=self.block_tables[:count],
                logits_indices=self._counting[:count],
            )
        return self._decode_batch

    def lay_out(
        self, num_new: np.ndarray, rows: np.ndarray | None, every: list[int] | None = None
    ) -> Batch:
        """The index arrays of a step in which row i computes its next num_new[i] tokens.

        Args:
            num_new: tokens per row in use, int32 [num_seqs], each at least 1.
            rows: whose last token's logits are wanted, ascending; None: of every row.
            every: rows that want the logits of each of their tokens.

        Returns:
            A batch; its block_tables is a view.
        """
        count = self.num_seqs
        computed = self.num_computed[:count]
        total = int(num_new.sum())
        if total == count:  # all decode
            cu_seqlens_q = self._counting[: count + 1]
            owner = self._counting[:count]
            positions = computed.copy()
        else:
            cu_seqlens_q = np.zeros(count + 1, np.int32)
            np.cumsum(num_new, out=cu_seqlens_q[1:])
            owner = np.repeat(self._counting[:count], num_new)  # the row of each token
            positions = np.arange(total, dtype=np.int32)
            positions += (computed - cu_seqlens_q[:-1])[owner]
        slots = self._slots(self._table_starts[owner], positions)
        ends = cu_seqlens_q[1:] if rows is None else cu_seqlens_q[1:][rows]
        logits_indices = ends - 1
        if every:
            wanted = np.isin(owner, every)
            wanted[logits_indices] = True
            logits_indices = wanted.nonzero()[0].astype(np.int32)
        return Batch(
            input_ids=self.token_ids[owner, positions],
            positions=positions,
            slot_mapping=slots,
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=computed + num_new,
            block_tables=self.block_tables[:count],
            logits_indices=logits_indices,
        )

    def _slots(
        self, starts: np.ndarray, positions: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Cache slots of tokens, given where their rows' tables start, and their positions.

        Of a row that ends with the step that is being computed, the next slot may be anybody's.
        """
        places = starts + (positions >> self._block_shift)
        slots = self.block_tables.reshape(-1).take(places, mode="clip")
        slots <<= self._block_shift
        return np.bitwise_or(slots, positions & self._block_mask, out=out)

    def _set_width(self, num_blocks: int) -> None:
        """Make block_tables so wide, rounded up to a power of two: few widths come up.

        No wider, since whole rows are most of what a step copies.
        """
        width = FIRST_WIDTH
        while width < num_blocks:
            width *= 2
        old, width = self.block_tables, min(width, self._max_blocks)
        shared = min(width, old.shape[1])
        self.block_tables = np.zeros((len(old), width), np.int32)
        self.block_tables[:, :shared] = old[:, :shared]
        # Where each row starts: one index takes half the time of two.
        self._table_starts = np.arange(0, self.block_tables.size, width, np.int32)
        self._forget_views()

    def _forget_views(self) -> None:
        self._decode_batch = self._decode_sampling = None

    def sampling(self, rows: np.ndarray) -> SamplingBatch | None:
        """How these rows' next tokens are chosen; None: all by arg-max.

        Of all rows it is a view, the same while no row comes or goes and edits have room.
        """
        if self.num_sampled == 0 or len(rows) == 0:
            return None
        edits = self._edits.edits
        if len(rows) < self.num_seqs:
            samplers = self.samplers.take(rows)  # indexing by rows: 20 us for 256, take: 2
            samplers["position"] = self.num_tokens[rows]
            return SamplingBatch(samplers, edits, most_logprobs(samplers))
        count = self.num_seqs
        self._positions[:count] = self.num_tokens[:count]
        if self._decode_sampling is None or self._decode_sampling.edits is not edits:
            samplers = self.samplers[:count]
            self._decode_sampling = SamplingBatch(samplers, edits, most_logprobs(samplers))
        return self._decode_sampling

    def filled_blocks(self) -> list[tuple[Sequence, int]]:
        """Blocks that became full since the last call, as (sequence, index), in order."""
        computed = self.num_computed[: self.num_seqs]
        filled = []
        for row in (computed >= self.fills_at[: self.num_seqs]).nonzero()[0].tolist():
            first = int(self.fills_at[row]) // self.block_size - 1
            num_full = int(computed[row]) // self.block_size
            filled += [(self.sequences[row], index) for index in range(first, num_full)]
            self.fills_at[row] = (num_full + 1) * self.block_size
        return filled

    def block_token_ids(self, sequence: Sequence, index: int) -> np.ndarray:
        """The tokens of one full block."""
        start = index * self.block_size
        return self.token_ids[sequence.row, start : start + self.block_size]

    def check_integrity(self) -> None:
        """Assert that rows and sequences agree."""
        for row, sequence in enumerate(self.sequences):
            assert sequence.row == row, f"row {row} belongs to {sequence.request_id}"
            table = sequence.block_table
            assert self.num_slots[row] == len(table) * self.block_size
            assert self.block_tables[row, : len(table)].tolist() == table, "tables differ"
            known, computed = int(self.num_tokens[row]), int(self.num_computed[row])
            assert 0 <= computed < known <= sequence.max_num_tokens, "nothing left to compute"
            assert computed <= len(table) * self.block_size
            assert self.fills_at[row] == (computed // self.block_size + 1) * self.block_size
            if self.is_ahead:
                slot = table[computed // self.block_size] * self.block_size
                assert self.next_slots[row] == slot + computed % self.block_size, "a wrong slot"
        watched = sum(sequence.is_watched for sequence in self.sequences)
        assert self.num_watched == watched, "the count of watched sequences is wrong"
