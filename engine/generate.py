"""Answer one prompt on the serving core, step by step, and time it.

Decides the room such an engine needs, and what counts as prefill. Knows token ids; knows nothing of
files or of the terminal.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.config import EngineConfig, ModelConfig
from engine.errors import InvalidArgument
from engine.llm_engine import LLMEngine
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 256
BLOCK_SIZE = 128  # tokens per KV block
MAX_STEP_TOKENS = 1024  # of a prefill step: bounds the memory of activations


@dataclass(frozen=True)
class Timings:
    """How long the answers took; the clock is monotonic and runs while the engine steps."""

    num_prompt_tokens: int
    num_new_tokens: int  # of all answers, with the tokens that ended them
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
    num_prompt_tokens: int,
    max_tokens: int,
    device: str,
    num_threads: int = 0,
    num_answers: int = 1,
) -> EngineConfig:
    """The smallest engine that can give these answers at once."""
    max_seq_len = num_prompt_tokens + max_tokens
    return EngineConfig(
        device=device,
        num_threads=num_threads,
        block_size=BLOCK_SIZE,
        num_blocks=-(-max_seq_len // BLOCK_SIZE) * num_answers,
        max_seq_len=max_seq_len,
        max_num_tokens=max(min(num_prompt_tokens, MAX_STEP_TOKENS), num_answers),
        max_num_seqs=num_answers,
    )


class Generation:
    """Iterates over one request's outputs, the last of which is finished; then `timings()`."""

    def __init__(
        self, engine: LLMEngine, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Queue the request; nothing runs before the first output is asked for.

        Raises:
            InvalidArgument: something is wrong with the request.
        """
        self._engine = engine
        self._prefill_seconds = 0.0
        self._decode_seconds = 0.0
        self._last: RequestOutput | None = None
        engine.add_request("0", prompt_ids, params)

    def __iter__(self) -> Iterator[RequestOutput]:
        """The outputs, each as soon as it is known."""
        while self._engine.has_unfinished_requests():
            is_prefill = self._last is None
            began = time.perf_counter()
            outputs = self._engine.step()
            seconds = time.perf_counter() - began
            if is_prefill:
                self._prefill_seconds += seconds
            else:
                self._decode_seconds += seconds
            for output in outputs:
                self._last = output
                yield output

    def timings(self) -> Timings:
        """How long it took, once the iteration has ended."""
        assert self._last is not None and self._last.finished, "the request is not finished"
        return Timings(
            num_prompt_tokens=self._last.usage.num_prompt_tokens,
            num_new_tokens=self._last.usage.num_completion_tokens,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
        )


def _rate(count: int, seconds: float) -> float | None:
    """Per second, if there is anything to divide."""
    return count / seconds if count > 0 and seconds > 0 else None
