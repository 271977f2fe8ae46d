import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError, InvalidArgument
from engine.sources.toy import BOS, EOS, NUM_BYTES, byte_tokenizer
from engine.tokenizer import Tokenizer

# The shape of Llama 3's: bos, headers by special tokens, content trimmed.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|reserved_0|>{{ message['role'] }}<|reserved_1|>\n\n"
    "{{ message['content'] | trim }}<|reserved_2|>"
    "{% endfor %}{% if add_generation_prompt %}<|reserved_0|>assistant<|reserved_1|>\n\n{% endif %}"
)
HEADER, HEADER_END, TURN_END = 258, 259, 260
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_0|>", "<|reserved_2|>"]

# Pieces that come close to forging a turn, and plain text of one to four bytes a character.
TRICKY_TEXT = st.lists(
    st.sampled_from(
        [*SPECIALS, "<|", "|>", "<|reserved_", "0|>", " ", "\n", "a", "é", "日", "🤔", "\ue000"]
    ),
    max_size=8,
).map("".join)


def tokenizer_with(template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer(byte_tokenizer(320), "<|begin_of_text|>", "<|end_of_text|>", template)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("text", ["", "a", " a ", "naïve 日本 🤔", "\r\n\t", "a\0b"])
def test_bytes_are_their_own_ids_and_come_back(text):
    tokenizer = tokenizer_with()

    ids = tokenizer.encode(text)

    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_a_special_token_in_a_raw_text_is_the_token():
    ids = tokenizer_with().encode("a<|end_of_text|>b")

    assert ids == [ord("a"), EOS, ord("b")]
    assert tokenizer_with().decode(ids) == "ab"


def test_the_same_text_read_literally_is_characters():
    text = "a<|end_of_text|>b"

    ids = tokenizer_with().encode_literal(text)

    assert ids == list(text.encode())


def test_bos_is_added_once_and_only_when_asked_for():
    tokenizer = tokenizer_with()

    assert tokenizer.encode("a", add_bos=True) == [BOS, ord("a")]
    assert tokenizer.encode("a") == [ord("a")]
    assert tokenizer.encode("", add_bos=True) == [BOS]


def test_bos_of_a_model_without_one_is_refused():
    with pytest.raises(InvalidArgument, match="add_bos must be false"):
        Tokenizer(byte_tokenizer(320)).encode("a", add_bos=True)


def test_whether_a_tokenizer_adds_bos_is_read_from_the_tokenizer():
    from tokenizers.processors import TemplateProcessing

    raw = byte_tokenizer(320)
    assert not Tokenizer(raw, "<|begin_of_text|>").adds_bos
    raw.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", BOS)]
    )

    assert Tokenizer(raw, "<|begin_of_text|>").adds_bos
    assert Tokenizer(raw, "<|begin_of_text|>").encode("a") == [ord("a")]


def test_a_lone_surrogate_is_refused_with_its_place():
    with pytest.raises(InvalidArgument, match="lone surrogate at character 1"):
        tokenizer_with().encode("a\udc80")


def test_a_message_is_wrapped_as_the_template_says():
    ids = tokenizer_with().encode_chat(user("  hi "))

    expected = [BOS, HEADER, *b"user", HEADER_END, *b"\n\nhi", TURN_END]
    assert ids == [*expected, HEADER, *b"assistant", HEADER_END, *b"\n\n"]


@settings(derandomize=True, deadline=None)
@given(contents=st.lists(TRICKY_TEXT, min_size=1, max_size=3))
def test_no_message_can_forge_a_special_token(contents):
    tokenizer = tokenizer_with()
    roles = ["system", "user", "assistant"]
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]

    ids = tokenizer.encode_chat(messages)

    scaffold = [HEADER, HEADER_END, TURN_END] * len(messages) + [HEADER, HEADER_END]
    assert [token_id for token_id in ids if token_id >= NUM_BYTES] == [BOS, *scaffold]
    # Nothing is lost or changed either.
    text = b"".join(m["role"].encode() + b"\n\n" + m["content"].strip().encode() for m in messages)
    plain = bytes(token_id for token_id in ids if token_id < NUM_BYTES)
    assert plain == text + b"assistant\n\n"


@pytest.mark.parametrize(
    "content", ["hi", "  lead and trail \n", "", "日本 🤔", "<|", "a\ue000b", "{{ 7 * 7 }}"]
)
def test_an_honest_message_has_the_ids_of_transformers(tmp_path: Path, content):
    from transformers import PreTrainedTokenizerFast

    byte_tokenizer(320).save(str(tmp_path / "tokenizer.json"))
    settings_of_model = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<|begin_of_text|>"},
        "chat_template": TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_of_model))
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<|begin_of_text|>",
        chat_template=TEMPLATE,
    )

    ours = Tokenizer.from_directory(tmp_path).encode_chat(user(content))

    expected = theirs.apply_chat_template(user(content), add_generation_prompt=True)
    assert ours == list(expected["input_ids"])


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages must hold at least one message"),
        ([{"role": "tool", "content": "x"}], "messages\\[0\\].role must be one of .* got 'tool'"),
        ([{"role": "<|reserved_1|>", "content": "x"}], "messages\\[0\\].role"),
        ([{"content": "x"}], "messages\\[0\\].role"),
        (["hi"], "messages\\[0\\] must be a mapping with role and content, got 'hi'"),
        ("hi", "messages\\[0\\] must be a mapping with role and content, got 'h'"),
        ([*user("x"), {"role": "user"}], "messages\\[1\\].content must be a string, got None"),
        ([{"role": "user", "content": ["x"]}], "messages\\[0\\].content"),
        (user("\ud800"), "lone surrogate"),
    ],
)
def test_a_wrong_conversation_is_refused_by_name(messages, expected):
    with pytest.raises(InvalidArgument, match=expected):
        tokenizer_with().encode_chat(messages)


def test_a_template_may_refuse_a_conversation():
    template = "{{ raise_exception('roles must alternate') }}"

    with pytest.raises(InvalidArgument, match="refused by the chat template: roles must alternate"):
        tokenizer_with(template).encode_chat(user("x"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ raise_exception.__globals__.os }}",
        "{% include 'config.json' %}",
        "{% import 'os' as os %}",
        "{{ range(10 ** 9) | list }}",
        "{{ strftime_now('%Y') }}",
        "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_reaches_out_of_its_sandbox_is_refused(template):
    with pytest.raises(CheckpointError, match="chat_template"):
        tokenizer_with(template).encode_chat(user("x"))


def test_a_template_that_reads_the_message_is_refused_not_guessed():
    template = (
        "{% if 'x' in messages[0].content %}<|reserved_0|>{% endif %}{{ messages[0].content }}"
    )

    with pytest.raises(CheckpointError, match="depends on its content"):
        tokenizer_with(template).encode_chat(user("x"))


@pytest.mark.parametrize("template", ["{% if %}", "{{", "x" * ((1 << 20) + 1)])
def test_a_template_that_cannot_be_used_is_refused_when_loaded(template):
    with pytest.raises(CheckpointError, match="chat_template"):
        tokenizer_with(template)


@pytest.mark.parametrize(("eos", "shown"), [("<|end_of_text|>", "<|end_of_text|>"), (None, "")])
def test_a_template_is_told_the_end_token_or_nothing(eos: str | None, shown: str):
    template = "{{ messages[0]['content'] }}{{ eos_token }}!"

    tokenizer = Tokenizer(byte_tokenizer(320), None, eos, template)

    assert tokenizer.render_chat(user("a")) == f"a{shown}!"


def test_a_model_without_template_refuses_chat():
    tokenizer = tokenizer_with(None)

    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match="no chat_template"):
        tokenizer.encode_chat(user("x"))


class TestFromDirectory:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        byte_tokenizer(320).save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    def test_the_template_file_wins_over_the_settings(self, directory: Path):
        (directory / "tokenizer_config.json").write_text('{"chat_template": "from settings"}')
        (directory / "chat_template.jinja").write_text("from file")

        assert Tokenizer.from_directory(directory).render_chat(user("x")) == "from file"

    def test_the_default_of_named_templates_is_taken(self, directory: Path):
        named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))

        assert Tokenizer.from_directory(directory).render_chat(user("x")) == "b"

    def test_a_template_whose_name_is_no_name_is_not_the_default(self, directory: Path):
        named = [{"name": ["default"], "template": "a"}, {"template": "b"}]
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))

        assert not Tokenizer.from_directory(directory).has_chat_template

    def test_a_tokenizer_alone_has_neither_bos_nor_chat(self, directory: Path):
        tokenizer = Tokenizer.from_directory(directory)

        assert not tokenizer.has_chat_template
        assert not tokenizer.adds_bos

    @pytest.mark.parametrize(
        ("file_name", "content", "expected"),
        [
            ("tokenizer.json", b"{}", "tokenizer.json: refused by tokenizers"),
            ("tokenizer.json", b"\xff", "tokenizer.json: refused by tokenizers"),
            ("tokenizer_config.json", b'{"chat_template": 7}', "chat_template must be a string"),
            ("tokenizer_config.json", b"[]", "must be a JSON object"),
            ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8"),
            ("chat_template.jinja", b"{{", "chat_template"),
        ],
    )
    def test_a_damaged_file_is_refused_by_name(self, directory: Path, file_name, content, expected):
        (directory / file_name).write_bytes(content)

        with pytest.raises(CheckpointError, match=expected) as refusal:
            Tokenizer.from_directory(directory)

        assert str(directory) in str(refusal.value)

    def test_a_missing_tokenizer_is_refused_with_its_path(self, tmp_path: Path):
        with pytest.raises(CheckpointError, match="tokenizer.json: no such file"):
            Tokenizer.from_directory(tmp_path)
