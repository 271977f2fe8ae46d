"""Ctrl-C at any line of the engine: the request is gone, everything else is as it was."""

import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.bindings import Library
from tests.tree import ENGINE

NUM_LINES_TRIED = 60
PROMPTS = [list(range(1, 40)), list(range(1, 20)), [7] * 33]
# Answers that follow one another, edits, scores, text that is held back, scored prompts.
PARAMS = [
    SamplingParams(n=3, seed=3, max_tokens=6, logprobs=1, repetition_penalty=1.3),
    SamplingParams(temperature=0, max_tokens=7, stop="zz"),
    SamplingParams(temperature=0.7, seed=5, max_tokens=9, prompt_logprobs=1),
]


class CtrlC:
    """Sends SIGINT before a line of engine/ is run; counts the lines.

    Args:
        at: the number of that line, from 1; 0: never.
    """

    def __init__(self, at: int) -> None:
        self.at, self.num_lines = at, 0
        self.where = ""

    def __enter__(self) -> "CtrlC":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable | None:
        if not frame.f_code.co_filename.startswith(str(ENGINE)):
            return None
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self._trace


@pytest.fixture
def python_hears_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def llm(library: Library):
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 16}
    with LLM(
        "toy",
        device="cpu",
        library=library,
        max_model_len=80,
        kv_cache_memory_bytes=8 << 14,  # eight blocks: some answers are preempted
        **small,
    ) as model:
        yield model


def answers(llm: LLM) -> list:
    found = llm.generate(PROMPTS, PARAMS)
    return [[(answer.token_ids, answer.text) for answer in each.outputs] for each in found]


@pytest.mark.usefixtures("python_hears_ctrl_c")
def test_ctrl_c_at_any_line_leaves_a_model_that_answers_as_before(llm):
    expected = answers(llm)
    with CtrlC(at=0) as counted:
        answers(llm)

    for at in random.Random(20).sample(range(1, counted.num_lines), NUM_LINES_TRIED):
        with pytest.raises(KeyboardInterrupt), CtrlC(at) as interrupted:
            answers(llm)

        llm.engine.scheduler.check_integrity()
        assert not llm.engine.has_unfinished_requests(), interrupted.where
        assert answers(llm) == expected, interrupted.where
