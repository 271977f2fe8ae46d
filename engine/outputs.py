"""What a caller gets back: one request's output, with an answer for each of its n.

Plain data under vLLM's names; knows nothing of how it came about.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from engine.sequence import FinishReason

Item = TypeVar("Item")


class Beginning(Sequence[Item]):
    """The first items of a list that only grows, as a tuple would have them, without copying them.

    An answer that is streamed has one for each of its tokens: copies would take longer with each.
    """

    __slots__ = ("_count", "_items")

    def __init__(self, items: list[Item]) -> None:
        self._items, self._count = items, len(items)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        if isinstance(index, slice):
            return tuple(self._items[i] for i in range(*index.indices(self._count)))
        return self._items[range(self._count)[index]]

    def __iter__(self) -> Iterator[Item]:
        return islice(self._items, self._count)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Beginning | tuple):
            return NotImplemented  # Python then asks the other side, as for every type
        return len(self) == len(other) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


@dataclass(frozen=True)
class Logprob:
    """A token's natural log-probability from the unmodified logits."""

    logprob: float
    rank: int  # 1: the most likely
    decoded_token: str | None  # its text on its own; None without a tokenizer


# Of one position: the chosen (in a prompt: the given) token and the most likely ones, by token id.
TokenLogprobs = Mapping[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One answer, as far as it is known."""

    index: int  # 0 .. n - 1
    text: str  # what is certain: it never shrinks and never changes
    delta: str  # the end of `text`, new since the request's output before
    token_ids: Sequence[int]  # with the token that ended it
    cumulative_logprob: float | None  # None: logprobs were not asked for
    logprobs: Sequence[TokenLogprobs] | None  # one per token of token_ids
    finish_reason: FinishReason | None  # None: more may come
    stop_reason: int | str | None  # the stop token or string, if not an end token of the model


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, taken from the prefix cache by the first answer
    num_completion_tokens: int  # of all answers
    num_preemptions: int  # how often an answer gave its blocks back

    @property
    def num_total_tokens(self) -> int:
        """Prompt and answers."""
        return self.num_prompt_tokens + self.num_completion_tokens


@dataclass(frozen=True)
class RequestOutput:
    """A request and its answers so far."""

    request_id: str
    prompt: str | None  # None: token ids were given
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None  # one per prompt token; None first
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    seed: int  # the one given, or the one the engine chose: with it the answers come again
    usage: Usage
