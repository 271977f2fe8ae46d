"""The door for requests, where another check behind it would say the same."""

import numpy as np
import pytest

from engine.errors import InvalidArgument
from engine.request_checks import longest_sequence, read_prompt
from engine.room import Room, make_room
from engine.sources.toy import CONFIGS


@pytest.mark.parametrize("max_tokens", [None, 0, 1])
def test_an_empty_prompt_has_no_length(max_tokens: int | None):
    room = make_room(Room(), CONFIGS["toy"], "cpu", lambda _: 0)

    with pytest.raises(InvalidArgument, match="prompt must have at least 1 token, got 0"):
        longest_sequence(0, max_tokens, CONFIGS["toy"], room)


@pytest.mark.parametrize("prompt", [np.array(5), b"ab", bytearray(b"ab"), 5, None], ids=repr)
def test_what_is_neither_a_text_nor_a_list_of_ids_is_refused(prompt: object):
    with pytest.raises(InvalidArgument, match="prompt must be a text or token ids"):
        read_prompt(prompt, None, 320)


@pytest.mark.parametrize("prompt", [[1, 2], (1, 2), np.array([1, 2]), range(1, 3)], ids=repr)
def test_token_ids_come_in_any_list(prompt: object):
    assert read_prompt(prompt, None, 320) == (None, [1, 2])
