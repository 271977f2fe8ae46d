from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.errors import InvalidArgument
from engine.generate import (
    BLOCK_SIZE,
    DEFAULT_MAX_TOKENS,
    MAX_STEP_TOKENS,
    Generation,
    Timings,
    answer_length,
    room_for,
)
from engine.llm_engine import LLMEngine
from engine.outputs import CompletionOutput
from engine.sampling import Logprobs, SamplingBatch
from engine.sampling_params import SamplingParams
from engine.sources.toy import CONFIGS
from tests.engine.paged_token_model import AtOnce, Output

EOS = 257
CONFIG = replace(CONFIGS["toy"], max_position_embeddings=1000, eos_token_ids=(EOS, 300))


class ScriptedRunner(AtOnce):
    """Gives scripted tokens to its rows, in order, and keeps every batch and its sampling."""

    def __init__(self, script: list[int]) -> None:
        self.script = list(script)
        self.batches: list[Batch] = []
        self.samplings: list[SamplingBatch | None] = []

    def forward(
        self, batch: Batch, *, sampling: SamplingBatch | None, wants_logits: bool
    ) -> Output:
        self.batches.append(Batch(**{name: array.copy() for name, array in vars(batch).items()}))
        self.samplings.append(deepcopy(sampling))
        rows = len(batch.logits_indices)
        tokens = [self.script.pop(0) for _ in range(rows)]
        return Output(np.zeros((rows, 1)), np.array(tokens, np.int32), Logprobs.empty(rows, 0))


def decode(
    script: list[int], num_prompt_tokens: int = 3, max_tokens: int = 8, step: int = MAX_STEP_TOKENS
) -> tuple[ScriptedRunner, CompletionOutput, Timings]:
    runner = ScriptedRunner(script)
    room = room_for(num_prompt_tokens, max_tokens, "cpu")
    room = replace(room, max_num_tokens=min(step, num_prompt_tokens))
    prompt_ids = [10 + i % 200 for i in range(num_prompt_tokens)]
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    generation = Generation(LLMEngine(runner, CONFIG, room), prompt_ids, params)
    outputs = list(generation)
    return runner, outputs[-1].outputs[0], generation.timings()


@pytest.mark.parametrize("eos", [EOS, 300])
def test_any_eos_token_ends_the_answer(eos):
    runner, answer, timings = decode([5, 6, eos, 7])

    assert answer.token_ids == (5, 6, eos)
    assert answer.finish_reason == "stop"
    assert len(runner.batches) == timings.num_new_tokens == 3


def test_the_first_token_may_end_the_answer():
    runner, answer, timings = decode([EOS, 7])

    assert (answer.token_ids, answer.finish_reason) == ((EOS,), "stop")
    assert len(runner.batches) == timings.num_new_tokens == 1


def test_max_tokens_ends_the_answer_without_a_wasted_step():
    runner, answer, _ = decode([5, 6, 7, 8], max_tokens=3)

    assert answer.token_ids == (5, 6, 7)
    assert answer.finish_reason == "length"
    assert len(runner.batches) == 3
    assert runner.script == [8]


@settings(derandomize=True, deadline=None)
@given(num_prompt_tokens=st.integers(1, 300), num_new=st.integers(1, 8), step=st.integers(1, 130))
def test_steps_cover_every_position_once_in_order(num_prompt_tokens, num_new, step):
    script = list(range(1, num_new + 1))

    runner, answer, timings = decode(script, num_prompt_tokens, num_new, step)

    fed = np.concatenate([batch.input_ids for batch in runner.batches])
    positions = np.concatenate([batch.positions for batch in runner.batches])
    slots = np.concatenate([batch.slot_mapping for batch in runner.batches])
    prompt = [10 + i % 200 for i in range(num_prompt_tokens)]
    assert answer.token_ids == tuple(script)
    assert fed.tolist() == prompt + script[:-1]
    assert positions.tolist() == list(range(num_prompt_tokens + num_new - 1))
    assert slots.tolist() == positions.tolist()  # blocks 0, 1, 2, ... in order
    sizes = [len(batch.input_ids) for batch in runner.batches]
    num_prefill = -(-num_prompt_tokens // step)
    assert max(sizes) <= step
    assert [len(batch.logits_indices) for batch in runner.batches] == (
        [0] * (num_prefill - 1) + [1] * num_new
    )
    assert timings.prefill_seconds > 0 and (timings.decode_seconds > 0) == (num_new > 1)


def test_timings_of_an_unfinished_request_are_nobodys():
    room = room_for(1, 4, "cpu")
    generation = Generation(
        LLMEngine(ScriptedRunner([5, 6]), CONFIG, room), [1], SamplingParams(max_tokens=4)
    )
    next(iter(generation))

    with pytest.raises(AssertionError, match="not finished"):
        generation.timings()


@pytest.mark.parametrize(
    ("num_prompt_tokens", "asked", "granted"),
    [
        (1, None, DEFAULT_MAX_TOKENS),
        (1000 - DEFAULT_MAX_TOKENS, None, DEFAULT_MAX_TOKENS),
        (1001 - DEFAULT_MAX_TOKENS, None, DEFAULT_MAX_TOKENS - 1),
        (999, None, 1),
        (999, 1, 1),
        (1, 999, 999),
    ],
)
def test_an_answer_gets_what_fits_the_context(num_prompt_tokens, asked, granted):
    assert answer_length(CONFIG, num_prompt_tokens, asked) == granted


@pytest.mark.parametrize(
    ("num_prompt_tokens", "asked", "expected"),
    [
        (0, None, "prompt must have at least 1 token, got 0"),
        (1000, None, "prompt must have at most 999 tokens .* got 1000"),
        (5000, 1, "got 5000"),
        (1, 1000, "max_tokens must be from 1 to 999 .* got 1000"),
        (999, 2, "max_tokens must be from 1 to 1 .* got 2"),
        (1, 0, "max_tokens must be from 1 to 999 .* got 0"),
        (1, -1, "got -1"),
    ],
)
def test_what_does_not_fit_the_context_is_refused_with_the_numbers(
    num_prompt_tokens, asked, expected
):
    with pytest.raises(InvalidArgument, match=expected):
        answer_length(CONFIG, num_prompt_tokens, asked)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "num_blocks"),
    [(1, 1, 1), (127, 1, 1), (128, 1, 2), (1, 255, 2), (1, 256, 3)],
)
def test_the_room_is_the_smallest_that_holds_prompt_and_answer(
    num_prompt_tokens, max_tokens, num_blocks
):
    room = room_for(num_prompt_tokens, max_tokens, "cpu", num_threads=3)

    assert room.num_blocks == num_blocks
    assert room.max_seq_len == num_prompt_tokens + max_tokens <= num_blocks * BLOCK_SIZE
    assert room.num_threads == 3


def test_a_long_prompt_is_prefilled_in_steps_of_bounded_size():
    assert room_for(MAX_STEP_TOKENS + 1, 1, "cpu").max_num_tokens == MAX_STEP_TOKENS


def test_several_answers_have_room_at_once():
    room = room_for(2, 128, "cpu", num_answers=3)

    assert (room.num_blocks, room.max_num_seqs, room.max_num_tokens) == (6, 3, 3)


def test_rates_leave_out_what_was_not_measured():
    # The first new token belongs to prefill: 4 tokens in 2 seconds of decoding are 3 steps.
    timings = Timings(10, 4, prefill_seconds=0.5, decode_seconds=2.0)

    assert timings.prefill_tokens_per_second == 20.0
    assert timings.decode_tokens_per_second == 1.5
    assert Timings(10, 1, 0.5, 0.0).decode_tokens_per_second is None
