"""The golden prompts: reads golden/prompts.jsonl and gives every model legal token ids.

Knows text, tokenizers and lengths; knows nothing of models' values, of the engine or of verdicts. A
line of the file holds an id, a reason (`why`) and one of three forms: `text`, `token_ids`, or
`repeat` (a text, and how many times). `num_tokens` makes a prompt exactly that long in every
vocabulary: its ids are repeated or cut. `models` keeps a prompt to models whose name begins so;
`quick` puts it in the short set.
Invariant: prompts keep the order of the file, ids are unique, every token id is below vocab_size.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path

from engine.errors import InvalidArgument
from engine.sources import toy

PROMPTS_PATH = Path(__file__).resolve().parent.parent / "golden" / "prompts.jsonl"

Encode = Callable[[str, bool], list[int]]  # (text, with the tokenizer's own special tokens) -> ids
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class PromptSpec:
    """One line of prompts.jsonl, before any tokenizer has seen it."""

    id: str
    why: str
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    repeat: tuple[str, int] | None = None
    num_tokens: int | None = None
    models: str = ""
    quick: bool = False


@dataclass(frozen=True)
class Prompt:
    """One prompt as one model reads it."""

    id: str
    why: str
    token_ids: tuple[int, ...]
    quick: bool = False

    @property
    def sha256(self) -> str:
        """SHA-256 of the token ids as little-endian int32."""
        return hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in self.token_ids)).hexdigest()


def load_specs(path: Path = PROMPTS_PATH) -> tuple[PromptSpec, ...]:
    """Reads and checks the prompt file.

    Raises:
        InvalidArgument: a line is not JSON, has unknown or missing fields, or repeats an id; the
            line is named.
    """
    specs: list[PromptSpec] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path.name} line {number}"
        try:
            spec = _spec(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidArgument(f"{where}: {error}") from error
        if any(spec.id == other.id for other in specs):
            raise InvalidArgument(f"{where}: id {spec.id!r} is used twice")
        specs.append(spec)
    if not specs:
        raise InvalidArgument(f"{path.name} holds no prompts")
    return tuple(specs)


def _spec(fields: object) -> PromptSpec:
    if not isinstance(fields, dict):
        raise ValueError("a prompt is a JSON object")
    known = {"id", "why", "text", "token_ids", "repeat", "num_tokens", "models", "quick"}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if missing := sorted({"id", "why"} - set(fields)):
        raise ValueError(f"field {missing[0]!r} is missing")
    if len({"text", "token_ids", "repeat"} & set(fields)) != 1:
        raise ValueError("exactly one of text, token_ids, repeat is needed")
    spec = PromptSpec(
        id=str(fields["id"]),
        why=str(fields["why"]),
        text=fields.get("text"),
        token_ids=tuple(fields["token_ids"]) if "token_ids" in fields else None,
        repeat=(fields["repeat"]["text"], fields["repeat"]["times"])
        if "repeat" in fields
        else None,
        num_tokens=fields.get("num_tokens"),
        models=fields.get("models", ""),
        quick=fields.get("quick", False),
    )
    if spec.num_tokens is not None and spec.num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {spec.num_tokens}")
    is_empty_repeat = spec.repeat is not None and (spec.repeat[0] == "" or spec.repeat[1] < 1)
    if spec.text == "" or spec.token_ids == () or is_empty_repeat:
        raise ValueError("a prompt needs at least one token")
    return spec


def prompts_sha256(path: Path = PROMPTS_PATH) -> str:
    """SHA-256 of the prompt file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encoder_for(model_dir: Path) -> Encode:
    """The model's own tokenizer, or bytes of UTF-8 where the directory has none."""
    path = Path(model_dir) / "tokenizer.json"
    if not path.exists():
        return lambda text, with_special: list(text.encode("utf-8"))
    from tokenizers import Tokenizer  # only here: models without text need no tokenizer library

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text, with_special: tokenizer.encode(text, add_special_tokens=with_special).ids


def decoder_for(model_dir: Path) -> Decode:
    """Text of token ids by the model's own tokenizer, special tokens shown; UTF-8 without one."""
    path = Path(model_dir) / "tokenizer.json"
    if not path.exists():
        return lambda ids: bytes(i % 256 for i in ids).decode("utf-8", "replace")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def to_prompt(spec: PromptSpec, encode: Encode, vocab_size: int) -> Prompt:
    """One spec as a model with this tokenizer and vocabulary reads it.

    Args:
        encode: text and whether special tokens are added -> ids.
        vocab_size: ids at or above it are taken modulo it.

    Raises:
        InvalidArgument: the tokenizer gives no token at all for the text.
    """
    if spec.token_ids is not None:
        first, more = list(spec.token_ids), list(spec.token_ids)
    else:
        text = spec.text if spec.repeat is None else spec.repeat[0] * spec.repeat[1]
        first, more = encode(text, True), encode(text, False)
    if not more:
        raise InvalidArgument(f"prompt {spec.id!r}: the tokenizer gives no token for its text")
    if spec.num_tokens is not None:
        # Special tokens open the prompt once; what fills it up is the text alone.
        first = list(islice(chain(first, cycle(more)), spec.num_tokens))
    return Prompt(spec.id, spec.why, tuple(i % vocab_size for i in first), spec.quick)


def prompts_for(
    model_name: str,
    model_dir: Path,
    vocab_size: int,
    selection: str = "all",
    path: Path = PROMPTS_PATH,
) -> tuple[Prompt, ...]:
    """The prompts that one model is verified with.

    Args:
        selection: "all", "quick", or prompt ids with commas between; ids may be any of
            the file's.

    Raises:
        InvalidArgument: an id is unknown.
    """
    specs = [spec for spec in load_specs(path) if _is_for(spec, model_name)]
    chosen = select(specs, selection)
    encode = encoder_for(model_dir)
    return tuple(to_prompt(spec, encode, vocab_size) for spec in chosen)


def select(specs: Iterable[PromptSpec], selection: str) -> tuple[PromptSpec, ...]:
    """Those specs that a selection ("all", "quick" or ids) names, in file order."""
    specs = tuple(specs)
    if selection == "all":
        return specs
    if selection == "quick":
        return tuple(spec for spec in specs if spec.quick)
    wanted = [word.strip() for word in selection.split(",")]
    known = [spec.id for spec in specs]
    for word in wanted:
        if word not in known:
            raise InvalidArgument(
                f"no prompt {word!r}; legal: all, quick, or ids of {', '.join(known)}"
            )
    return tuple(spec for spec in specs if spec.id in wanted)


def names_prompts(selection: str | None) -> bool:
    """Whether a selection says which prompts by their ids; else a set of them is meant."""
    return selection not in (None, "all", "quick")


def default_selection(model_name: str) -> str:
    """The prompts of a run or a record that names none: the short set for our toys, else all."""
    return "quick" if model_name in toy.CONFIGS else "all"


def _is_for(spec: PromptSpec, model_name: str) -> bool:
    return model_name.startswith(spec.models)
