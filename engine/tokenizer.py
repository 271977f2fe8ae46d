"""Text to token ids and back, for one model directory.

Holds the tokenizer and the chat template. What a user writes stays text: a special token spelled
out in a chat message is encoded as the characters it consists of, never as the token, so no message
can forge a turn. Templates come from the model directory alone and run in jinja2's sandbox without
clock, files or imports. Knows nothing of tensors or of the engine.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, InvalidArgument
from engine.json_file import MAX_JSON_BYTES, contained_file, read_json_object
from engine.text_stream import TextStream

ROLES = ("system", "user", "assistant")
MAX_TEMPLATE_CHARS = 1 << 20  # Llama 3.2's has 4 thousand
MAX_PROMPT_CHARS = 64 << 20  # what a template may write: a hundred times the largest context
MASK = "\ue000"  # a private-use character: in no special token and in no template

Message = Mapping[str, str]  # {"role": one of ROLES, "content": text}


class Tokenizer:
    """The tokenizer of one model, with its chat template if it has one."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wrap a loaded tokenizer; see `from_directory`."""
        self._tokenizer = tokenizer  # reads special tokens in text as such
        self._literal: tokenizers.Tokenizer | None = (
            None  # reads them as characters; made when needed
        )
        self._bos_token = bos_token
        self._eos_token = eos_token
        self._special_ids = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._template = None if chat_template is None else _compile(chat_template)
        self._silent_ids = frozenset(self._special_ids.values()) | _byte_ids(tokenizer)

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """The tokenizer of a model directory.

        Reads `tokenizer.json`, the bos and eos tokens and the chat template of
        `tokenizer_config.json`, and `chat_template.jinja`, which wins, as in transformers.

        Raises:
            CheckpointError: no tokenizer there, or one that cannot be used; the message names the
                file.
        """
        directory = Path(directory)
        path = contained_file(directory, "tokenizer.json")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: size is {path.stat().st_size} bytes, the limit is {MAX_JSON_BYTES}"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: refused by tokenizers: {error}") from error

        config: dict[str, Any] = {}
        if (directory / "tokenizer_config.json").exists():
            config = read_json_object(directory, "tokenizer_config.json")
        template = _template_of(directory / "tokenizer_config.json", config.get("chat_template"))
        if (directory / "chat_template.jinja").exists():
            template_path = contained_file(directory, "chat_template.jinja")
            try:
                template = template_path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(
                    f"{template_path}: not UTF-8 at byte {error.start}"
                ) from error
        try:
            return cls(
                tokenizer,
                _token_text(config, "bos_token"),
                _token_text(config, "eos_token"),
                template,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether the model knows turns, not only text to go on with."""
        return self._template is not None

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer, left to itself, starts every text with the bos token."""
        ids = self._tokenizer.encode("", add_special_tokens=True).ids
        return self._bos_token is not None and ids[:1] == [self._special_ids.get(self._bos_token)]

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of a text in which special tokens are read as such.

        Args:
            text: to be continued as it stands.
            add_bos: put the bos token first.

        Raises:
            InvalidArgument: add_bos, but the model has no bos token, or the text is no valid
                Unicode.
        """
        bos_ids: list[int] = []
        if add_bos:
            if self._bos_token is None or self._bos_token not in self._special_ids:
                raise InvalidArgument("add_bos must be false: the model has no bos token")
            bos_ids = [self._special_ids[self._bos_token]]
        return bos_ids + self._ids(self._tokenizer, text)

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are mere characters."""
        if self._literal is None:
            self._literal = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            self._literal.encode_special_tokens = True
        return self._ids(self._literal, text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's next turn.

        The bos token is the template's business and is not added.

        Args:
            messages: in order, each with `role` and `content`.

        Raises:
            InvalidArgument: no message, an unknown role, or a conversation the template refuses.
            CheckpointError: the model has no chat template, or one whose result cannot be traced to
                the messages.
        """
        rendered = self.render_chat(messages)
        # With every character of the messages masked, only the template's own special tokens are
        # left.
        masked = self.render_chat(
            [{**message, "content": _masked(message["content"])} for message in messages]
        )
        if len(masked) != len(rendered) or any(
            ours != theirs and theirs != MASK for ours, theirs in zip(rendered, masked, strict=True)
        ):
            raise CheckpointError(
                "chat_template: the text around a message depends on its content: not implemented"
            )
        scaffold = list(self._special_pattern.finditer(masked))
        if [match.span() for match in self._special_pattern.finditer(rendered)] == [
            match.span() for match in scaffold
        ]:
            return self._ids(self._tokenizer, rendered)

        ids: list[int] = []
        end = 0
        for match in scaffold:
            ids += self.encode_literal(rendered[end : match.start()])
            ids.append(self._special_ids[match.group()])
            end = match.end()
        return ids + self.encode_literal(rendered[end:])

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The text of a conversation as the model's template writes it; see `encode_chat`."""
        if self._template is None:
            raise CheckpointError("the model has no chat_template")
        if not messages:
            raise InvalidArgument("messages must hold at least one message, got none")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise InvalidArgument(
                    f"messages[{index}] must be a mapping with role and content, got {message!r}"
                )
            if message.get("role") not in ROLES:
                raise InvalidArgument(
                    f"messages[{index}].role must be one of {ROLES}, got {message.get('role')!r}"
                )
            if not isinstance(message.get("content"), str):
                raise InvalidArgument(
                    f"messages[{index}].content must be a string, got {message.get('content')!r}"
                )
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self._bos_token or "",
                eos_token=self._eos_token or "",
                raise_exception=_refuse_conversation,
            ):
                size += len(part)
                if size > MAX_PROMPT_CHARS:
                    raise CheckpointError(
                        f"chat_template: writes over {MAX_PROMPT_CHARS} characters"
                    )
                parts.append(part)
        except (CheckpointError, InvalidArgument):
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            raise CheckpointError(f"chat_template: {type(error).__name__}: {error}") from error
        return "".join(parts)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A decoder that is given one token at a time."""
        return TextStream(self.decode, self._is_silent)

    def _is_silent(self, token_id: int) -> bool:
        """Whether a token is no text, or a byte that makes text only with those around it."""
        is_known = self._tokenizer.id_to_token(token_id) is not None
        return token_id in self._silent_ids or not is_known

    def _ids(self, tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"text must be valid Unicode, got a lone surrogate at character {error.start}"
            ) from error
        return tokenizer.encode(text, add_special_tokens=False).ids


def _byte_ids(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    """Tokens of single bytes, `<0x00>` to `<0xFF>`, where the decoder takes them as such."""
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    letter = ids[ord("A")]
    is_byte_fallback = letter is not None and tokenizer.decode([letter]) == "A"
    return frozenset(ids) - {None} if is_byte_fallback else frozenset()


def _compile(source: str) -> jinja2.Template:
    """A chat template in the sandbox, with the settings of transformers."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(
            f"chat_template: size is {len(source)} characters, the limit is {MAX_TEMPLATE_CHARS}"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"chat_template: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse_conversation(message: str) -> NoReturn:
    """What a template calls on a conversation it does not accept."""
    raise InvalidArgument(f"messages are refused by the chat template: {message}")


def _masked(text: str) -> str:
    """The same length and the same white space, and no other character of the original."""
    return "".join(character if character.isspace() else MASK for character in text)


def _template_of(path: Path, value: Any) -> str | None:
    """The template in tokenizer_config.json: a text, or a list of named ones."""
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[-1].get("template") if named else None
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{path}: chat_template must be a string, got {type(value).__name__}")
    return value


def _token_text(config: dict[str, Any], name: str) -> str | None:
    """A special token of tokenizer_config.json: a text, or an object with its content."""
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
