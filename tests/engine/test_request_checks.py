"""The door for requests, where another check behind it would say the same."""

import pytest

from engine.errors import InvalidArgument
from engine.request_checks import longest_sequence
from engine.room import Room, make_room
from engine.sources.toy import CONFIGS


@pytest.mark.parametrize("max_tokens", [None, 0, 1])
def test_an_empty_prompt_has_no_length(max_tokens: int | None):
    room = make_room(Room(), CONFIGS["toy"], "cpu", lambda _: 0)

    with pytest.raises(InvalidArgument, match="prompt must have at least 1 token, got 0"):
        longest_sequence(0, max_tokens, CONFIGS["toy"], room)
