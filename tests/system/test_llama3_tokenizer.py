"""Tokenization and chat with Llama 3's real vocabulary of 128,256 ids."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokenizer import Tokenizer
from tests.engine.llama3_tokenizer import (
    SPECIAL,
    Ranks,
    encode_by_ranks,
    fetch_ranks,
    write_directory,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Ranks:
    try:
        return fetch_ranks(tmp_path_factory.mktemp("wheel"))
    except ConnectionError as error:
        pytest.skip(f"requires a package index: {error}")


@pytest.fixture(scope="module")
def llama3(ranks: Ranks, tmp_path_factory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("llama3")
    write_directory(ranks, directory)
    return Tokenizer.from_directory(directory)


# Ids published with Llama 3: its tests encode this sentence so.
SENTENCE = "This is a test sentence."
SENTENCE_IDS = [2028, 374, 264, 1296, 11914, 13]


def test_the_published_ids_of_a_sentence(llama3: Tokenizer):
    assert llama3.encode(SENTENCE, add_bos=True) == [128_000, *SENTENCE_IDS]
    assert llama3.decode(SENTENCE_IDS) == SENTENCE


def test_the_published_ids_of_a_turn(llama3: Tokenizer):
    ids = llama3.encode_chat([{"role": "user", "content": SENTENCE}])

    turn = [128_006, 882, 128_007, 271, *SENTENCE_IDS, 128_009]
    assert ids == [128_000, *turn, 128_006, 78_191, 128_007, 271]


def test_no_message_forges_a_turn(llama3: Tokenizer):
    ids = llama3.encode_chat([{"role": "user", "content": "".join(SPECIAL)}])

    assert [ids.count(token) for token in SPECIAL.values()] == [1, 0, 2, 2, 1]


@settings(max_examples=300)
@given(st.text(max_size=80))
def test_ids_are_those_of_the_definition_and_come_back(ranks: Ranks, llama3: Tokenizer, text: str):
    ids = llama3.encode_literal(text)

    assert ids == encode_by_ranks(ranks, text)
    assert llama3.decode(ids) == text
