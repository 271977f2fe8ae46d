"""One request in the engine: its sequences, and what each has answered so far.

Turns tokens, text and logprobs into the `RequestOutput` a caller sees. Decides nothing about when
anything runs; knows nothing of batches, blocks or C.
"""

from collections.abc import Sequence as Items

from engine.answer_text import AnswerText
from engine.outputs import (
    Beginning,
    CompletionOutput,
    Logprob,
    RequestOutput,
    TokenLogprobs,
    Usage,
)
from engine.sampling import Logprobs
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.tokenizer import Tokenizer


class Answer:
    """What one sequence has said.

    Args:
        sequence: where the tokens come from.
        params: of the request.
        tokenizer: None: answers have no text.
        is_streamed: text is wanted as it comes, not only at the end.
    """

    def __init__(
        self,
        sequence: Sequence,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        is_streamed: bool,
    ) -> None:
        self.sequence = sequence
        self._params = params
        self._tokenizer = tokenizer
        self._text: AnswerText | None = None
        if tokenizer is not None and (is_streamed or params.stop):
            self._text = AnswerText(
                tokenizer.stream(), params.stop, params.include_stop_str_in_output
            )
        self._num_told = 0  # characters of earlier outputs
        self._token_ids: list[int] = []  # kept while watched: the running batch has them too
        self._logprobs: list[TokenLogprobs] = []
        self._cumulative_logprob = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens answered so far, as far as this answer was told."""
        return len(self._token_ids)

    def push(self, token_id: int, logprobs: TokenLogprobs | None) -> str | None:
        """Take the next token in; the stop string that it completed, or None."""
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
            self._cumulative_logprob += logprobs[token_id].logprob
        if self._text is None:
            return None
        may_stop = len(self._token_ids) > self._params.min_tokens
        found = None
        if not self._ends_with_stop_token or self._params.include_stop_str_in_output:
            found = self._text.push(token_id, may_stop)
        if found is None and self.sequence.is_finished:
            found = self._text.finish(may_stop)
        return found

    def output(self) -> CompletionOutput:
        """The answer so far; once the sequence has ended, the whole."""
        sequence = self.sequence
        if sequence.is_finished:
            self._token_ids = sequence.token_ids[sequence.num_prompt_tokens :]
        text = self._whole_text() if self._text is None else self._text.released
        if sequence.finish_reason == "abort" and self._text is not None:
            self._text.finish(may_stop=False)
            text = self._text.released
        delta, self._num_told = text[self._num_told :], len(text)
        as_told = tuple if sequence.is_finished else Beginning
        has_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=sequence.index,
            text=text,
            delta=delta,
            token_ids=as_told(self._token_ids),
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
            logprobs=as_told(self._logprobs) if has_logprobs else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    @property
    def _ends_with_stop_token(self) -> bool:
        reason = self.sequence.stop_reason
        return self.sequence.finish_reason == "stop" and not isinstance(reason, str)

    def _whole_text(self) -> str:
        """Of an answer whose text nobody asked for before."""
        if self._tokenizer is None or not self.sequence.is_finished:
            return ""
        ids = self._token_ids
        if self._ends_with_stop_token and not self._params.include_stop_str_in_output:
            ids = ids[:-1]
        return self._tokenizer.decode(ids)


class Request:
    """A request and its n answers."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        params: SamplingParams,
        seed: int,
        sequences: Items[Sequence],
        tokenizer: Tokenizer | None,
        is_streamed: bool,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.is_streamed = is_streamed
        self.answers = [Answer(sequence, params, tokenizer, is_streamed) for sequence in sequences]
        self._prompt = prompt
        self.prompt_ids = tuple(sequences[0].token_ids)
        self._seed = seed
        self._tokenizer = tokenizer
        self._prompt_logprobs: list[TokenLogprobs | None] = [None]

    @property
    def is_finished(self) -> bool:
        """Whether every answer has ended."""
        return not any([answer.sequence.finish_reason is None for answer in self.answers])

    @property
    def num_prompt_logprobs(self) -> int:
        """Prompt positions scored so far; position 0 follows nothing and counts as scored."""
        return len(self._prompt_logprobs)

    def score_prompt(self, logprobs: TokenLogprobs) -> None:
        """Take in the scores of the next prompt token."""
        self._prompt_logprobs.append(logprobs)

    def token_logprobs(
        self, logprobs: Logprobs, row: int, token_id: int, count: int
    ) -> TokenLogprobs:
        """A row of a step's logprobs by token id: the token itself and `count` alternatives.

        Of a vocabulary that has fewer tokens, all of them.
        """
        scores = {token_id: (float(logprobs.token_logprobs[row]), int(logprobs.token_ranks[row]))}
        tops = zip(logprobs.top_ids[row, :count], logprobs.top_logprobs[row, :count], strict=True)
        for rank, (top_id, logprob) in enumerate(tops, start=1):
            if top_id >= 0:
                scores.setdefault(int(top_id), (float(logprob), rank))
        return {
            token: Logprob(logprob, rank, self._decoded(token))
            for token, (logprob, rank) in scores.items()
        }

    def _decoded(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token_id])

    def output(self) -> RequestOutput:
        """What is known now."""
        outputs = tuple(answer.output() for answer in self.answers)
        sequences = [answer.sequence for answer in self.answers]
        wants_prompt = self.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=tuple(self._prompt_logprobs) if wants_prompt else None,
            outputs=outputs,
            finished=self.is_finished,
            seed=self._seed,
            usage=Usage(
                num_prompt_tokens=len(self.prompt_ids),
                num_cached_tokens=sequences[0].num_cached_tokens,
                num_completion_tokens=sum(len(output.token_ids) for output in outputs),
                num_preemptions=sum(sequence.num_preemptions for sequence in sequences),
            ),
        )
