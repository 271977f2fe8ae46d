"""Answers of one prompt among themselves: what may end one, and what the cache may not change.

The model is a script, or remembers tokens in its cache (tests/engine/paged_token_model.py): which
token comes does not matter here, only which of them the answer holds.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.sampling_params import SamplingParams
from engine.sources.toy import CONFIGS
from tests.engine.paged_token_model import AtOnce, Output, PagedTokenModel

BLOCK_SIZE = 16
ROOM = EngineConfig(
    "cpu",
    block_size=BLOCK_SIZE,
    num_blocks=10,
    max_seq_len=150,
    max_num_tokens=64,
    max_num_seqs=4,
)
LONGEST = 12
ENDS = st.frozensets(st.integers(0, 5), max_size=3)


class Recited(AtOnce):
    """Answers with the tokens of a script, whatever is asked or banned."""

    def __init__(self, script: Sequence[int]) -> None:
        self._script, self._said = script, 0

    def forward(self, batch, *, sampling, wants_logits) -> Output:
        rows = len(batch.logits_indices)
        token = self._script[self._said] if rows else 0
        self._said += rows
        return Output(np.zeros((rows, 1)), np.full(rows, token, np.int32))


def answer(script: Sequence[int], ends: frozenset[int] = frozenset(), **params) -> list[int]:
    config = replace(CONFIGS["toy"], eos_token_ids=tuple(ends))
    engine = LLMEngine(Recited(script), config, ROOM)
    params = {"temperature": 0, "max_tokens": LONGEST} | params
    engine.add_request("r", [7, 8, 9], SamplingParams(**params), stream=False)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return list(outputs[-1].outputs[0].token_ids)


def until(free: list[int], ends: frozenset[int], min_tokens: int) -> list[int]:
    places = [i for i, token in enumerate(free) if token in ends and i >= min_tokens]
    return free[: places[0] + 1] if places else free


@given(
    st.lists(st.integers(0, 5), min_size=LONGEST, max_size=LONGEST),
    ENDS,
    st.integers(0, 4),
    st.integers(1, LONGEST),
)
def test_an_answer_that_ends_is_the_beginning_of_one_that_does_not(
    script: list[int], ends: frozenset[int], min_tokens: int, max_tokens: int
):
    free = answer(script, ignore_eos=True)
    assert free == script

    assert answer(script, ignore_eos=True, max_tokens=max_tokens) == free[:max_tokens]
    wanted = until(free, ends, min_tokens)
    stops = {"stop_token_ids": tuple(ends), "min_tokens": min_tokens, "ignore_eos": True}
    assert answer(script, **stops) == wanted
    if ends:  # the model's own
        assert answer(script, ends, min_tokens=min_tokens) == wanted
        assert answer(script, ends, ignore_eos=True) == free


def fed(prompt: list[int], engine: LLMEngine) -> tuple[int, ...]:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    engine.add_request("r", prompt, params, stream=False)
    found = []
    while engine.has_unfinished_requests():
        found += engine.step()
    return found[-1].outputs[0].token_ids


def remembering(**room: int) -> LLMEngine:
    room = replace(ROOM, **room)
    return LLMEngine(PagedTokenModel(room.num_blocks, BLOCK_SIZE, 200), CONFIGS["toy"], room)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 48])
def test_a_prompt_that_the_cache_holds_is_answered_as_at_first(length: int):
    prompt, engine = list(range(length)), remembering()

    assert [fed(prompt, engine) for _ in range(3)] == 3 * [fed(prompt, remembering())]


def test_equal_blocks_behind_other_beginnings_are_other_blocks():
    middle, end = [5] * BLOCK_SIZE, [1, 2, 3]
    prompts = [[start] * BLOCK_SIZE + middle + end for start in (7, 8)] + [middle + middle + end]
    alone = [fed(prompt, remembering()) for prompt in prompts]
    engine = remembering()

    assert [fed(prompt, engine) for prompt in prompts + prompts] == alone + alone
    assert len(set(alone)) == len(prompts)


def ends_after(
    priority: int, others: Sequence[str] = ("first", "second")
) -> tuple[int, tuple[int, ...]]:
    """Where one runs at a time: the steps until the last of three has its answer, and that one."""
    engine = remembering(max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for i, name in enumerate(others):
        engine.add_request(name, [i, 2, 3], params, stream=False)
        engine.step()
    engine.add_request("last", [7, 8, 9], params, stream=False, priority=priority)
    for step in range(1000):
        for output in engine.step():
            if output.request_id == "last":
                return step, output.outputs[0].token_ids
    raise AssertionError("it never ended")


def test_whoever_is_more_urgent_has_the_same_answer_no_later():
    (late, one), (middle, two), (early, three) = (ends_after(p) for p in (1, 0, -1))

    assert early < middle <= late
    assert one == two == three
    assert ends_after(0, others=()) == (early, three)  # it waits for nobody
