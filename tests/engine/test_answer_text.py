"""Stop strings and released text, against a reading of the whole text character by character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.answer_text import AnswerText
from engine.models import resolve
from engine.tokenizer import Tokenizer


class Spelled:
    """Token i is the i-th piece of a text."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def finish(self) -> str:
        return self.rest


def read(
    pieces: list[str], stop: tuple[str, ...], include_stop: bool = False, min_tokens: int = 0
) -> tuple[str, str | None, list[str]]:
    """The text, the stop string, and what was released after each token."""
    answer, seen = AnswerText(Spelled(pieces), stop, include_stop), []
    for i in range(len(pieces)):
        found = answer.push(i, may_stop=i >= min_tokens)
        seen.append(answer.released)
        if found is not None:
            return answer.released, found, seen
    return answer.released, answer.finish() or None, [*seen, answer.released]


def by_characters(
    pieces: list[str], stop: tuple[str, ...], include_stop: bool, min_tokens: int
) -> tuple[str, str | None]:
    """The specification: after each character, does the text end with a stop string?"""
    text = ""
    for i, piece in enumerate(pieces):
        for character in piece:
            text += character
            ending = [s for s in stop if text.endswith(s)]
            if ending and i >= min_tokens:
                found = max(ending, key=len)
                return text if include_stop else text[: -len(found)], found
    return text, None


TEXT = st.text("ab", max_size=6)


@given(
    st.lists(TEXT, min_size=1, max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3).map(tuple),
    st.booleans(),
    st.integers(0, 4),
)
def test_any_cut_of_a_text_stops_where_its_characters_say(pieces, stop, include_stop, min_tokens):
    expected, expected_stop = by_characters(pieces, stop, include_stop, min_tokens)
    answer, found = AnswerText(Spelled(pieces), stop, include_stop), None
    shown = ""

    for i in range(len(pieces)):
        found = answer.push(i, may_stop=i >= min_tokens)
        assert answer.released.startswith(shown), "a text that was shown has changed"
        shown = answer.released
        assert expected.startswith(shown), "shown, but not part of the answer"
        if found is not None:
            break
    if found is None:
        found = answer.finish(may_stop=False)

    assert (answer.released, found) == (expected, expected_stop)


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "found", "shown"),
    [
        (["ab", "c"], ("bc",), "a", "bc", ["a", "a"]),
        (["ab", "d"], ("bc",), "abd", None, ["a", "abd", "abd"]),
        (["a", "b", "c", "d"], ("abcd",), "", "abcd", ["", "", "", ""]),
        (["aab"], ("ab",), "a", "ab", ["a"]),
        (["a", "ab"], ("aab", "ab"), "", "aab", ["", ""]),  # complete together: the longest
        (["xabcd"], ("abcd", "bc"), "xa", "bc", ["xa"]),  # complete first
        (["x"], (), "x", None, ["x", "x"]),
    ],
)
def test_text_is_held_exactly_as_long_as_it_may_be_a_stop_string(pieces, stop, text, found, shown):
    assert read(pieces, stop) == (text, found, shown)


def test_a_held_beginning_is_released_at_the_end():
    answer = AnswerText(Spelled(["xa"]), ("ab",))
    answer.push(0)
    assert answer.released == "x"

    assert answer.finish() is None
    assert answer.released == "xa"
    assert answer.finish() is None and answer.released == "xa"  # nothing twice


def test_the_end_of_an_incomplete_character_may_complete_a_stop_string():
    answer = AnswerText(Spelled(["x"], rest="\ufffd"), ("\ufffd",))
    answer.push(0)

    assert answer.finish() == "\ufffd"
    assert answer.released == "x"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(resolve("toy"))


@given(st.text("aé€🙂", max_size=8), st.integers(0, 3), st.integers(0, 30))
def test_a_character_is_released_whole_and_late_bytes_are_not_lost(tokenizer, text, cut, at):
    # the toy's tokens are bytes: every border of every character is a border of tokens
    data = text.encode()
    data = data[: max(0, len(data) - cut)]
    answer, shown = AnswerText(tokenizer.stream(), ("€🙂",)), ""

    for byte in data:
        found = answer.push(byte)
        assert answer.released.startswith(shown) and "\ufffd" not in answer.released
        shown = answer.released
        if found is not None:
            assert answer.released == text[: text.index("€🙂")]
            return
    answer.finish()

    assert answer.released == data.decode("utf-8", "replace")
