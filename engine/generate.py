"""Answer one prompt greedily: prefill in steps of bounded size, then one token per step.

Decides the room such an engine needs, the KV blocks of its one sequence (0, 1, 2, ... in order) and
when the answer ends. Knows token ids; knows nothing of text, of files or of the terminal.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.batch import Batch, SequenceSlice, build_batch
from engine.config import EngineConfig, ModelConfig
from engine.errors import InvalidArgument

DEFAULT_MAX_TOKENS = 256
BLOCK_SIZE = 128  # tokens per KV block
MAX_STEP_TOKENS = 1024  # of a prefill step: bounds the memory of activations


class StepResult(Protocol):
    """What a step returns; only the arg-max is used here."""

    next_ids: np.ndarray  # [num_logits] int32


class Runner(Protocol):
    """The part of `ModelRunner` that decoding needs."""

    def forward(self, batch: Batch) -> StepResult:
        """Run one step."""
        ...


@dataclass(frozen=True)
class Timings:
    """How long an answer took; the clock is monotonic."""

    num_prompt_tokens: int
    num_new_tokens: int  # with the one that ended the answer
    prefill_seconds: float  # up to and including the first new token
    decode_seconds: float  # all later tokens

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens per second."""
        return _rate(self.num_prompt_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens per second after the first; None when there was only one."""
        return _rate(self.num_new_tokens - 1, self.decode_seconds)


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    token_ids: tuple[int, ...]  # without the token that ended it
    finish_reason: str  # "stop": the model ended it; "length": max_tokens did
    timings: Timings


def answer_length(config: ModelConfig, num_prompt_tokens: int, max_tokens: int | None) -> int:
    """How many tokens an answer may have.

    Args:
        config: its max_position_embeddings is the context, prompt and answer together.
        num_prompt_tokens: tokens of the prompt, special tokens included.
        max_tokens: as asked for; None: as many as fit, `DEFAULT_MAX_TOKENS` at most.

    Raises:
        InvalidArgument: an empty prompt, or prompt and answer that do not fit together.
    """
    context = config.max_position_embeddings
    if num_prompt_tokens < 1:
        raise InvalidArgument("prompt must have at least 1 token, got 0")
    if num_prompt_tokens >= context:
        raise InvalidArgument(
            f"prompt must have at most {context - 1} tokens (max_position_embeddings {context}, "
            f"one of them for the answer), got {num_prompt_tokens}"
        )
    if max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, context - num_prompt_tokens)
    if not 1 <= max_tokens <= context - num_prompt_tokens:
        raise InvalidArgument(
            f"max_tokens must be from 1 to {context - num_prompt_tokens} (max_position_embeddings "
            f"{context} less {num_prompt_tokens} prompt tokens), got {max_tokens}"
        )
    return max_tokens


def room_for(
    num_prompt_tokens: int, max_tokens: int, device: str, num_threads: int = 0
) -> EngineConfig:
    """The smallest engine that can give this answer."""
    max_seq_len = num_prompt_tokens + max_tokens
    return EngineConfig(
        device=device,
        num_threads=num_threads,
        block_size=BLOCK_SIZE,
        num_blocks=-(-max_seq_len // BLOCK_SIZE),
        max_seq_len=max_seq_len,
        max_num_tokens=min(num_prompt_tokens, MAX_STEP_TOKENS),
        max_num_seqs=1,
    )


class GreedyDecoder:
    """Iterates over an answer's tokens; when it is exhausted, `answer()` tells the rest."""

    def __init__(
        self,
        runner: Runner,
        engine_config: EngineConfig,
        prompt_ids: Sequence[int],
        max_tokens: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        """Prepare; nothing runs before the first token is asked for."""
        if not prompt_ids:
            raise InvalidArgument("prompt must have at least 1 token, got 0")
        self._runner = runner
        self._config = engine_config
        self._prompt_ids = list(prompt_ids)
        self._max_tokens = max_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._block_table = list(range(engine_config.num_blocks))
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None
        self._num_sampled = 0  # with the token that ends the answer
        self._prefill_seconds = 0.0
        self._decode_seconds = 0.0

    def __iter__(self) -> Iterator[int]:
        """The new tokens, each as soon as it is known, without the one that ends the answer."""
        began = time.perf_counter()
        token_id = self._prefill()
        self._prefill_seconds = time.perf_counter() - began
        while True:
            self._num_sampled += 1
            if token_id in self._eos_token_ids:
                self._finish_reason = "stop"
                return
            self._token_ids.append(token_id)
            if self._num_sampled == self._max_tokens:
                self._finish_reason = "length"
            yield token_id
            if self._finish_reason is not None:
                return
            began = time.perf_counter()
            token_id = self._step([token_id], len(self._prompt_ids) + self._num_sampled - 1)
            self._decode_seconds += time.perf_counter() - began

    def answer(self) -> Answer:
        """The whole answer, once the iteration has ended."""
        assert self._finish_reason is not None, "the answer is not finished"
        return Answer(
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason,
            timings=Timings(
                num_prompt_tokens=len(self._prompt_ids),
                num_new_tokens=self._num_sampled,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
            ),
        )

    def _prefill(self) -> int:
        """The first new token; the prompt goes through in steps of at most max_num_tokens."""
        step = self._config.max_num_tokens
        last = (len(self._prompt_ids) - 1) // step * step  # where the last step begins
        for start in range(0, last, step):
            self._forward(self._prompt_ids[start : start + step], start, "none")
        return self._step(self._prompt_ids[last:], last)

    def _step(self, token_ids: list[int], start: int) -> int:
        """The token that follows `token_ids`, the first of which stands at position `start`."""
        return int(self._forward(token_ids, start, "last").next_ids[0])

    def _forward(self, token_ids: list[int], start: int, logits: str) -> StepResult:
        row = SequenceSlice(token_ids=token_ids, start=start, block_table=self._block_table)
        return self._runner.forward(build_batch([row], self._config.block_size, logits=logits))


def _rate(count: int, seconds: float) -> float | None:
    """Per second, if there is anything to divide."""
    return count / seconds if count > 0 and seconds > 0 else None
