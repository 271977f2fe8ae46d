"""Say how the tokens of one request are chosen and when it ends: `SamplingParams`, vLLM's names.

Decides every limit, in one table; a value that exists is a value the engine can serve. Knows no
model: `check_vocabulary` holds the token ids to one. Checked at birth, frozen.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import InvalidArgument

MAX_VOCAB_SIZE = 1 << 24  # the largest vocabulary an engine takes, csrc/runtime/limits.c
MAX_LOGPROBS = 20  # alternatives per token
MAX_LOGIT_BIAS = 1024  # entries
MAX_STOP = 16  # strings
MAX_STOP_CHARACTERS = 256  # of one stop string
MAX_STOP_TOKEN_IDS = 256
MAX_INT32 = 2**31 - 1

# Field -> lowest and highest value. Below a temperature of 1e-5 a draw would be the arg-max, above
# 100 nearly uniform; penalties have OpenAI's range; a top_p under 1e-6 would keep one token, as
# top_k=1 does.
_INTEGERS: dict[str, tuple[int, int]] = {
    "n": (1, 128),
    "top_k": (0, MAX_VOCAB_SIZE),
    "seed": (0, 2**64 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "min_tokens": (0, MAX_INT32),
    "max_tokens": (1, MAX_INT32),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (1e-5, 100.0),  # or 0
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_LOGIT_BIAS = (-100.0, 100.0)
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs", "max_tokens")


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; names, meanings and defaults are vLLM's.

    Order of work on a token's logits: logit_bias, repetition_penalty, frequency_penalty,
    presence_penalty, the ban of min_tokens, temperature, top_k, top_p, min_p (docs/numerics.md).

    Raises:
        InvalidArgument: a value outside its range, naming field, limit and value.
    """

    n: int = 1  # answers
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # only the k most likely, and those equal to the last of them; 0: all
    top_p: float = 1.0  # only the most likely that hold this mass together, as top_k has left it
    min_p: float = 0.0  # only those with this share of the most likely one's probability
    repetition_penalty: float = 1.0  # divides logits > 0, multiplies others: prompt and answer
    presence_penalty: float = 0.0  # subtracted once from every token of the answer
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the answer
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these ids
    seed: int | None = None  # None: the caller of the engine chooses one
    logprobs: int | None = None  # of the token and of so many alternatives, unmodified logits
    prompt_logprobs: int | None = None  # the same for every prompt token after the first
    stop: tuple[str, ...] = ()  # a string or several; the answer ends before the first of them
    stop_token_ids: tuple[int, ...] = ()  # the answer ends with one of these
    min_tokens: int = 0  # no token that ends the answer is drawn before so many others
    max_tokens: int | None = 16  # None: as many as the context has room for
    ignore_eos: bool = False  # the model's own end tokens do not end the answer
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        """Refuse what is out of range; bring values to plain Python types."""
        for name, (low, high) in _INTEGERS.items():
            if not (name in _OPTIONAL and getattr(self, name) is None):
                self._set(name, _integer(name, getattr(self, name), low, high))
        for name, (low, high) in _NUMBERS.items():
            self._set(name, _number(name, getattr(self, name), low, high))
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._set("logit_bias", _logit_bias(self.logit_bias))
        self._set("stop", _stop(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidArgument(
                f"min_tokens must be at most max_tokens {self.max_tokens}, got {self.min_tokens}"
            )
        if self.temperature == 0 and self.n > 1:
            raise InvalidArgument(
                f"n must be 1 when temperature is 0 (all answers would be one), got {self.n}"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """The parameters of untrusted data, such as a parsed JSON object.

        Raises:
            InvalidArgument: a name that does not exist, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise InvalidArgument(f"sampling parameters must be an object, got {values!r}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise InvalidArgument(
                f"{unknown[0]} is no sampling parameter; there are {', '.join(sorted(known))}"
            )
        return cls(**values)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, not one drawn."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that came before change the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Hold the token ids to a model's vocabulary.

        Raises:
            InvalidArgument: an id of logit_bias or stop_token_ids that the model does not have.
        """
        for name, ids in (
            ("logit_bias", self.logit_bias or ()),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise InvalidArgument(
                        f"{name} must name ids under vocab_size {vocab_size}, got {token_id}"
                    )


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidArgument(f"{name} must be an integer from {low} to {high}, got {value!r}")
    if not low <= value <= high:
        raise InvalidArgument(f"{name} must be from {low} to {high}, got {_shown(value)}")
    return int(value)


def _number(name: str, value: object, low: float, high: float) -> float:
    also = "0 or " if name == "temperature" else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidArgument(f"{name} must be a number, {also}from {low} to {high}, got {value!r}")
    if not (low <= value <= high or (also and value == 0)):  # a NaN is in no range
        raise InvalidArgument(f"{name} must be {also}from {low} to {high}, got {_shown(value)}")
    return float(value)


def _logit_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"logit_bias must map token ids to numbers, got {value!r}")
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidArgument(
            f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {len(value)}"
        )
    low, high = _LOGIT_BIAS
    return {
        _integer("logit_bias's token id", key, 0, MAX_VOCAB_SIZE - 1): _number(
            f"logit_bias of {key}", bias, low, high
        )
        for key, bias in value.items()
    }


def _stop(value: object) -> tuple[str, ...]:
    strings = _items("stop", (value,) if isinstance(value, str) else value, "strings", MAX_STOP)
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            shown = f"one of {len(string)}" if isinstance(string, str) else repr(string)
            raise InvalidArgument(
                f"stop must hold strings of 1 to {MAX_STOP_CHARACTERS} characters, got {shown}"
            )
    return strings


def _stop_token_ids(value: object) -> tuple[int, ...]:
    ids = _items("stop_token_ids", value, "token ids", MAX_STOP_TOKEN_IDS)
    return tuple(_integer("stop_token_ids", token_id, 0, MAX_VOCAB_SIZE - 1) for token_id in ids)


def _items(name: str, value: object, what: str, limit: int) -> tuple[Any, ...]:
    """The elements of an optional list."""
    if value is None:
        return ()
    try:
        items = None if isinstance(value, str | bytes | Mapping) else tuple(value)
    except TypeError:  # also of what says that it is iterable: an array without a dimension
        items = None
    if items is None:
        raise InvalidArgument(f"{name} must be a list of {what}, got {value!r}")
    if len(items) > limit:
        raise InvalidArgument(f"{name} must have at most {limit} {what}, got {len(items)}")
    return items


def _shown(value: object) -> str:
    """A number as a message shows it: no digits beyond what a line holds."""
    text = f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
