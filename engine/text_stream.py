"""One sequence's tokens as pieces of text while they come.

Decides when text is certain. Knows how to ask for the text of token ids; knows nothing of
vocabularies, requests or stop strings.
"""

from collections.abc import Callable, Sequence

NO_CHARACTER = "\ufffd"  # what bytes that are no UTF-8 become


class TextStream:
    """Turns one sequence's tokens into pieces of text as they come.

    What is decoded is a window: the tokens of the last piece and all after it, as a decoder may
    look at a token's neighbours. A piece waits while its last character is incomplete, and while
    the last token is a silent one: a run of byte tokens is decoded as a whole, so that one wrong
    byte takes back the characters before it, and special tokens do not end such a run.

    Invariant: all pieces together are what `decode` makes of all tokens together.

    Args:
        decode: the text of token ids; what is no UTF-8 is U+FFFD in it.
        is_silent: whether a token has no text on its own, whatever comes before it.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], is_silent: Callable[[int], bool]
    ) -> None:
        self._decode = decode
        self._is_silent = is_silent
        self._token_ids: list[int] = []
        self._start = 0  # of the window
        self._num_told = 0  # tokens whose text was released
        self._told = ""  # their text, as far as it is in the window
        self._num_chars = 0  # of all pieces

    def push(self, token_id: int) -> str:
        """The text that became certain with this token: empty while a character is incomplete."""
        self._token_ids.append(token_id)
        if self._is_silent(token_id):
            return ""
        text = self._decode(self._token_ids[self._start :])
        if text.endswith(NO_CHARACTER) or not text.startswith(self._told):
            return ""
        piece = text[len(self._told) :]
        if piece:
            self._start, self._num_told = self._num_told, len(self._token_ids)
            self._told = self._decode(self._token_ids[self._start :])
            self._num_chars += len(piece)
        return piece

    def finish(self) -> str:
        """What was held back: an incomplete last character, as U+FFFD."""
        rest = self._decode(self._token_ids)[self._num_chars :]
        self._num_chars += len(rest)
        return rest
