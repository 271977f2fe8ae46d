import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Vocabulary
from tokenizers import decoders, models, normalizers

from engine.sources.toy import EOS, byte_tokenizer
from engine.tokenizer import Tokenizer


def fallback_tokenizer() -> Tokenizer:
    """Llama 2's kind: ids 3 .. 258 are `<0x00>` .. `<0xFF>`, for what is no word: 259 and up."""
    words = ["▁", "a", "b", "▁a", "é", "日"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Vocabulary(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[("▁", "a")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(names[:3])
    return Tokenizer(tokenizer, "<s>", "</s>")


BYTE_LEVEL = Tokenizer(byte_tokenizer(320), "<|begin_of_text|>", "<|end_of_text|>")
BYTE_FALLBACK = fallback_tokenizer()


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "favourites"),
    [
        pytest.param(BYTE_LEVEL, 320, [0xE6, 0x97, 0xA5, 0xFF, ord("a"), EOS], id="byte-level"),
        pytest.param(
            BYTE_FALLBACK,
            265,
            [3 + 0xE6, 3 + 0x97, 3 + 0xA5, 3 + 0x0A, 2, 259, 260, 262, 264],
            id="byte-fallback",
        ),
    ],
)
@settings(derandomize=True, deadline=None)
@given(data=st.data())
def test_streamed_pieces_are_together_what_decode_gives(tokenizer, vocab_size, favourites, data):
    any_id = st.integers(0, vocab_size)  # the last is none of its own
    ids = data.draw(st.lists(st.sampled_from(favourites) | any_id, max_size=24))
    stream = tokenizer.stream()

    pieces = [stream.push(token_id) for token_id in ids]

    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


# Bytes that make no character together turn into one U+FFFD each, the newline among them.
def test_a_byte_that_a_later_one_may_undo_is_not_shown_before_the_next_word():
    newline, bad_byte, word = 3 + ord("\n"), 3 + 0xFF, 260
    told, undone = BYTE_FALLBACK.stream(), BYTE_FALLBACK.stream()

    assert [told.push(token_id) for token_id in (word, newline, word)] == ["a", "", "\na"]
    assert [undone.push(token_id) for token_id in (newline, bad_byte, word)] == ["", "", "��a"]


def test_a_character_of_four_tokens_appears_with_its_last():
    stream = BYTE_LEVEL.stream()

    pieces = [stream.push(byte) for byte in "🤔!".encode()]

    assert pieces == ["", "", "", "🤔", "!"]
    assert stream.finish() == ""


def test_an_incomplete_character_at_the_end_is_not_lost():
    stream = BYTE_LEVEL.stream()

    pieces = [stream.push(byte) for byte in b"a\xf0\x9f"]

    assert pieces == ["a", "", ""]
    assert stream.finish() == BYTE_LEVEL.decode(list(b"a\xf0\x9f"))[1:] != ""
    assert stream.finish() == ""  # told once
