"""The door for requests, where another check behind it would say the same."""

import numpy as np
import pytest

from engine.errors import InvalidArgument
from engine.request_checks import longest_sequence, read_prompt
from engine.room import Room, make_room
from engine.sources.toy import CONFIGS, byte_tokenizer
from engine.tokenizer import Tokenizer


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


# A step would refuse it, and with it every other request of the step, again and again.
def test_a_text_with_a_token_beyond_the_models_vocabulary_is_refused_at_the_door():
    tokenizer = Tokenizer(byte_tokenizer(320))

    assert read_prompt("a<|reserved_61|>", tokenizer, 320) == ("a<|reserved_61|>", [97, 319])
    with pytest.raises(InvalidArgument, match="prompt has a token 319 .* has 0 to 318"):
        read_prompt("a<|reserved_61|>", tokenizer, 319)


@pytest.mark.parametrize(("length", "shown"), [(60, 60), (61, 60)])
def test_a_long_value_is_shown_by_its_first_57_characters(length: int, shown: int):
    value = b"a" * (length - len(repr(b"")))

    with pytest.raises(InvalidArgument) as refused:
        read_prompt(value, None, 320)

    text = str(refused.value).partition("got ")[2]
    assert len(text) == shown
    assert text == (repr(value) if length == shown else repr(value)[:57] + "...")
