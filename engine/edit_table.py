"""The edits of all running rows in one array: the logits that change before the choice.

A row's edits lie together, and a step's tokens are noted in all rows at once: the work of a step
does not grow with the tokens that its rows have seen. What a row begins with is its sampler's; what
a token then changes is said by `engine.sampling`, which does the same row by row. Decides nothing.
"""

import numpy as np

from engine.sampling import COUNT, EDIT, EDIT_BANNED, EDIT_SEEN, FLAGS, TOKEN_ID, SequenceSampler

FIRST_ROOM = 16  # edits of a row; doubles for all where one has more
_WIDTH = len(EDIT)  # int32 of an edit


class EditTable:
    """Room for the edits of some rows.

    Args:
        samplers: the rows' parameters, ROW [num_rows]; first_edit and num_edits are kept here.
        vocab_size: token ids are below it.
    """

    def __init__(self, samplers: np.ndarray, vocab_size: int) -> None:
        self._first, self._count = samplers["first_edit"], samplers["num_edits"]
        self._vocab_size = vocab_size
        self._is_counting = np.zeros(len(samplers), bool)  # every token is an edit: penalties
        self._num_counting = 0
        # Where a token is among its row's edits, from 1; int32 [num_rows * vocab_size] once needed.
        # The system gives no page of it that nobody writes to.
        self._places = np.zeros(0, np.int32)
        # Row: how many tokens lift its bans, and where they are among its edits.
        self._bans: dict[int, tuple[int, np.ndarray]] = {}
        self._make_room(FIRST_ROOM)

    def put(self, row: int, sampler: SequenceSampler) -> None:
        """Take over the edits of a row that has none."""
        edits = sampler.edits
        if len(edits) > self._room:
            self._make_room(len(edits))
        if sampler.ban_end is not None:
            self._bans[row] = sampler.ban_end, (edits[:, FLAGS] & EDIT_BANNED).nonzero()[0]
        self._set(row, edits, sampler.params.has_penalties)

    def move(self, row: int, new_row: int) -> None:
        """Give a row's edits to one that has none."""
        if not (self._count[row] or self._is_counting[row]):
            return
        if row in self._bans:
            self._bans[new_row] = self._bans[row]
        self._set(new_row, self._edits_of(row), bool(self._is_counting[row]))
        self.remove(row)

    def remove(self, row: int) -> None:
        """Forget a row's edits."""
        if not (self._count[row] or self._is_counting[row]):
            return
        if self._is_counting[row]:
            self._places[self._places_of(row)] = 0
            self._is_counting[row] = False
            self._num_counting -= 1
        self._edits_of(row)[:] = 0  # a new edit begins with it
        self._count[row] = 0
        self._bans.pop(row, None)

    def note(self, rows: np.ndarray, token_ids: np.ndarray, num_tokens: np.ndarray) -> None:
        """Take note of the newest tokens.

        Args:
            rows: which have one, ascending.
            token_ids: the tokens, int32 [len(rows)].
            num_tokens: how many tokens each row has now, with them, [num_rows].
        """
        if self._num_counting:
            if self._num_counting < len(rows) or not self._is_counting[rows].all():
                chosen = self._is_counting[rows].nonzero()[0]
                rows, token_ids = rows[chosen], token_ids[chosen]
            self._count_tokens(rows, token_ids)
        for row in [row for row, (end, _) in self._bans.items() if num_tokens[row] >= end]:
            _, banned = self._bans.pop(row)
            self._words[row * self._room + banned, FLAGS] &= ~EDIT_BANNED

    def _count_tokens(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        cells = rows * self._vocab_size + token_ids
        places = self._places.take(cells)
        new = (places == 0).nonzero()[0]
        if len(new):
            added = self._count[rows[new]] + 1
            if added.max() > self._room:
                self._make_room(int(added.max()))
            places[new] = self._places[cells[new]] = self._count[rows[new]] = added
        at = rows * self._room + (places - 1)
        self._words[at, TOKEN_ID] = token_ids
        self._words[at, COUNT] += 1
        self._words[at, FLAGS] |= EDIT_SEEN

    def _make_room(self, num_edits: int) -> None:
        """Let each row have so many edits."""
        room = FIRST_ROOM
        while room < num_edits:
            room *= 2
        words = np.zeros((len(self._first) * room, _WIDTH), np.int32)
        for row in self._count.nonzero()[0].tolist():
            words[row * room :][: self._count[row]] = self._edits_of(row)
        self._room, self._words = room, words
        self._first[:] = np.arange(0, len(words), room)
        self.edits = words.view(EDIT)[:, 0]

    def _set(self, row: int, edits: np.ndarray, is_counting: bool) -> None:
        self._first[row], self._count[row] = row * self._room, len(edits)
        self._edits_of(row)[:] = edits
        if is_counting:
            self._is_counting[row] = True
            self._num_counting += 1
            if len(self._places) == 0:
                self._places = np.zeros(len(self._first) * self._vocab_size, np.int32)
            self._places[self._places_of(row)] = np.arange(1, len(edits) + 1)

    def _edits_of(self, row: int) -> np.ndarray:
        """A row's edits as int32 [num_edits, 4]; a view."""
        return self._words[row * self._room :][: self._count[row]]

    def _places_of(self, row: int) -> np.ndarray:
        """Where the places of a row's edits are noted."""
        return row * self._vocab_size + self._edits_of(row)[:, TOKEN_ID]
