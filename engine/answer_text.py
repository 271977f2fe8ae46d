"""The text of one answer while its tokens come: stop strings found, nothing shown that may vanish.

Text is released once it is certain: a character when all its bytes are there, and what may be the
beginning of a stop string when it turns out not to be one. So what was released is never taken
back. A stop string counts from the moment its last character is there, wherever the borders of
tokens are: the one that is complete first wins, the longest of those complete together.
"""

from typing import Protocol


class Pieces(Protocol):
    """Token ids to text, as `engine.tokenizer.TextStream` does it."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        ...

    def finish(self) -> str:
        """What was held back."""
        ...


class AnswerText:
    """One answer's text.

    Args:
        pieces: turns its tokens into text.
        stop: stop strings, none of them empty.
        include_stop: whether the stop string is part of the text.
    """

    def __init__(
        self, pieces: Pieces, stop: tuple[str, ...] = (), include_stop: bool = False
    ) -> None:
        self.released = ""
        self._pieces = pieces
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_id: int, may_stop: bool = True) -> str | None:
        """Take the next token.

        Args:
            token_id: of the answer; not the stop token that ends it.
            may_stop: whether a stop string that this token completes counts.

        Returns:
            The stop string that ends the answer here, or None.
        """
        return self._take(self._pieces.push(token_id), may_stop)

    def finish(self, may_stop: bool = True) -> str | None:
        """Release the rest: no token follows. A stop string may still be completed by it."""
        found = self._take(self._pieces.finish(), may_stop)
        if found is None:
            self.released += self._held
            self._held = ""
        return found

    def _take(self, piece: str, may_stop: bool) -> str | None:
        num_checked = len(self._held)  # a stop string must end beyond them
        self._held += piece
        if may_stop and piece and (match := self._first_stop(num_checked)) is not None:
            end, start = match
            self.released += self._held[: end if self._include_stop else start]
            found, self._held = self._held[start:end], ""
            return found
        keep = self._num_to_hold()
        self.released += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return None

    def _first_stop(self, num_checked: int) -> tuple[int, int] | None:
        """(end, start) of the stop string that is complete first, the longest of several."""
        matches = []
        for stop in self._stop:
            start = self._held.find(stop, max(0, num_checked - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start))
        return min(matches, default=None)

    def _num_to_hold(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
