"""Serve requests step by step: `add_request`, `abort`, `step`.

Joins policy, runner and text: a request is checked at the door, becomes sequences, and its answers
grow as the scheduler lets them. Who runs when, and what a token looks like, is decided elsewhere. A
refused request changes nothing, so none can harm another. Ctrl-C is heard between two changes, not
in the middle of one. One thread at a time.
"""

import contextlib
import secrets
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from engine.batch import Batch
from engine.config import EngineConfig, ModelConfig
from engine.errors import InvalidArgument
from engine.interrupts import Uninterrupted
from engine.outputs import RequestOutput
from engine.request import Request
from engine.request_checks import Prompt, check_request, longest_sequence, read_prompt
from engine.sampling import Logprobs, PromptToken, SamplingBatch, SequenceSampler, spread
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledStep, Scheduler
from engine.sequence import Sequence
from engine.tokenizer import Tokenizer


class StepResult(Protocol):
    """The part of `StepOutput` that serving needs."""

    next_ids: np.ndarray
    logprobs: Logprobs | None


class Runner(Protocol):
    """The part of `ModelRunner` that serving needs."""

    def begin(self, batch: Batch, *, sampling: SamplingBatch | None, wants_logits: bool) -> None:
        """Start a step; the batch's arrays may change from here on."""
        ...

    def end(self) -> StepResult:
        """Wait for the step that was begun."""
        ...


class LLMEngine:
    """Requests in, outputs out, one step of the model at a time.

    Args:
        runner: runs batches; its room is `config`.
        model_config: the model's vocabulary, context and end tokens.
        config: room; max_num_tokens is the budget of a step.
        tokenizer: None: prompts must be token ids and answers have no text.
        enable_prefix_caching: whether equal prefixes share blocks.
        max_waiting: sequences that may wait; more are refused with `QueueFull`.
        async_scheduling: whether the next step is prepared while one is computed.
    """

    def __init__(
        self,
        runner: Runner,
        model_config: ModelConfig,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        enable_prefix_caching: bool = True,
        max_waiting: int = 1 << 16,
        async_scheduling: bool = True,
    ) -> None:
        self.runner = runner
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.scheduler = Scheduler(
            config,
            model_config.eos_token_ids,
            model_config.vocab_size,
            max_waiting,
            enable_prefix_caching,
        )
        self.async_scheduling = async_scheduling
        self._requests: dict[str, Request] = {}
        self._num_arrived = 0

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
        stream: bool = True,
    ) -> None:
        """Queue a request.

        Args:
            request_id: a name that no unfinished request has.
            prompt: a text, or token ids.
            params: None: the defaults.
            priority: lower runs earlier; -1000 .. 1000.
            stream: whether each step gives an output; else only the last.

        Raises:
            InvalidArgument: something is wrong with the request; nothing has changed.
            QueueFull: too many wait.
        """
        params = SamplingParams() if params is None else params
        check_request(request_id, params, priority, self._requests)
        text, prompt_ids = read_prompt(prompt, self.tokenizer, self.model_config.vocab_size)
        max_num_tokens = longest_sequence(
            len(prompt_ids), params.max_tokens, self.model_config, self.scheduler.config
        )
        params.check_vocabulary(self.model_config.vocab_size)
        if params.stop and self.tokenizer is None:
            raise InvalidArgument("stop must be empty: this model has no tokenizer")
        seed = secrets.randbits(64) if params.seed is None else params.seed
        sequences = self._sequences(
            params,
            prompt_ids,
            seed,
            max_num_tokens,
            request_id=request_id,
            priority=priority,
            is_watched=stream or _looks_at_tokens(params),
        )
        leader = sequences[0]
        leader.followers = sequences[1:]
        request = Request(request_id, text, params, seed, sequences, self.tokenizer, stream)
        with Uninterrupted():
            self.scheduler.add(leader)
            self._num_arrived += 1
            self._requests[request_id] = request

    def _sequences(
        self,
        params: SamplingParams,
        prompt_ids: list[int],
        seed: int,
        max_num_tokens: int,
        **shared: Any,
    ) -> list[Sequence]:
        """One for each answer to a request; `shared` are further fields, of all of them."""
        eos_token_ids = self.model_config.eos_token_ids
        return [
            Sequence(
                token_ids=list(prompt_ids),
                index=index,
                arrival=self._num_arrived,
                max_num_tokens=max_num_tokens,
                # The parameter may be any number, the room not: beyond it nothing can end.
                min_num_tokens=min(len(prompt_ids) + params.min_tokens, max_num_tokens),
                ignore_eos=params.ignore_eos,
                stop_token_ids=frozenset(params.stop_token_ids),
                wants_prompt_logits=index == 0 and params.prompt_logprobs is not None,
                is_sampled=_is_sampled(params),
                is_edited=_is_edited(params),
                sampler=SequenceSampler(params, prompt_ids, seed, index, eos_token_ids),
                **shared,
            )
            for index in range(params.n)
        ]

    def abort(self, request_ids: str | Iterable[str]) -> list[RequestOutput]:
        """End requests now, wherever they are; names that are not there are no error.

        Returns:
            Their outputs so far, finished with reason "abort".
        """
        with Uninterrupted():
            return self._abort([request_ids] if isinstance(request_ids, str) else request_ids)

    def _abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        outputs = []
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is None:
                continue
            for answer in reversed(request.answers):  # followers before those they wait for
                if not answer.sequence.is_finished:
                    self.scheduler.finish(answer.sequence, "abort")
            outputs.append(request.output())
        return outputs

    def step(self) -> list[RequestOutput]:
        """Run one step of the model.

        Returns:
            An output for each request that ended, and for each streamed one that got a token.
        """
        with Uninterrupted():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        step = self.scheduler.schedule()
        if step is None:
            return []
        result = self._run(step)
        next_ids = result.next_ids[step.logits_rows] if step.prompts else result.next_ids
        self._score_prompts(step, result)
        committed = self.scheduler.commit(step, next_ids)
        touched: dict[str, None] = {}
        for sequence, token_id, place in committed.watched:
            self._take(sequence, token_id, step.logits_rows[place], result.logprobs)
            touched[sequence.request_id] = None
        for sequence in committed.finished:
            touched[sequence.request_id] = None
        return self._outputs(touched)

    def _run(self, step: ScheduledStep) -> StepResult:
        """The model's part of a step; whatever interrupts it, no step is left under way."""
        try:
            self.runner.begin(step.batch, sampling=self._sampling(step), wants_logits=False)
            if self.async_scheduling:
                self.scheduler.prepare(step)
            return self.runner.end()
        except BaseException:
            # Until a step that was begun has ended, no other can begin, and the blocks that it
            # writes to belong to nobody else.
            with contextlib.suppress(Exception):  # what came first is told
                self.runner.end()
            raise

    def _take(self, sequence: Sequence, token_id: int, row: int, logprobs: Logprobs | None) -> None:
        """Tell an answer its new token; a stop string in it ends the sequence."""
        request = self._requests[sequence.request_id]
        scores = None
        if request.params.logprobs is not None:
            scores = request.token_logprobs(logprobs, row, token_id, request.params.logprobs)
        found = request.answers[sequence.index].push(token_id, scores)
        if found is not None:
            self.scheduler.finish(sequence, "stop", found)

    def _outputs(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        outputs = []
        for request_id in request_ids:
            request = self._requests[request_id]
            is_finished = request.is_finished
            if is_finished:
                del self._requests[request_id]
            if is_finished or request.is_streamed:
                outputs.append(request.output())
        return outputs

    def _sampling(self, step: ScheduledStep) -> SamplingBatch | None:
        """How the step's rows of logits are sampled; None: all by arg-max."""
        running = self.scheduler.running
        sampling = running.sampling(step.rows)
        if not step.prompts:
            return sampling
        scored = {}
        for part in step.prompts:
            request = self._requests[part.sequence.request_id]
            count = request.params.prompt_logprobs
            ids = request.prompt_ids
            for i in range(part.count):
                follower = part.start + i + 1
                if request.num_prompt_logprobs <= follower < len(ids):
                    scored[part.first_logits_row + i] = PromptToken(ids[follower], count)
        return spread(sampling, step.logits_rows, len(step.batch.logits_indices), scored)

    def _score_prompts(self, step: ScheduledStep, result: StepResult) -> None:
        for part in step.prompts:
            request = self._requests[part.sequence.request_id]
            count, ids = request.params.prompt_logprobs, request.prompt_ids
            for i in range(part.count):
                follower = part.start + i + 1
                if request.num_prompt_logprobs <= follower < len(ids):
                    row = part.first_logits_row + i
                    request.score_prompt(
                        request.token_logprobs(result.logprobs, row, ids[follower], count)
                    )


def _is_edited(params: SamplingParams) -> bool:
    """Whether logits change before the choice."""
    return params.has_penalties or bool(params.logit_bias) or params.min_tokens > 0


def _is_sampled(params: SamplingParams) -> bool:
    """Whether more is asked of a row of logits than its arg-max."""
    return not params.is_greedy or _is_edited(params) or params.logprobs is not None


def _looks_at_tokens(params: SamplingParams) -> bool:
    """Whether an answer needs each token when it comes, not only all at the end."""
    return params.logprobs is not None or bool(params.stop or params.stop_token_ids)
