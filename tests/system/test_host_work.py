"""The work of a decode step in Python does not grow with its rows: no loop over sequences.

Lines are counted, not seconds; `tests/benchmarks/test_bench_serving.py` has those.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

import engine
from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.model_runner import StepOutput
from engine.sampling_params import SamplingParams
from engine.sources.toy import CONFIGS
from tests.engine.paged_token_model import AtOnce

ENGINE = str(Path(engine.__file__).parent)
WAYS = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.8, "top_p": 0.9},
    "biased": {"temperature": 0, "logit_bias": {5: 1.0}},
    "penalised": {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
}


class NoModel(AtOnce):
    """Answers each row with another token, none of them an end."""

    def forward(self, batch, *, sampling, wants_logits) -> StepOutput:
        return StepOutput(None, 10 + np.arange(len(batch.logits_indices), dtype=np.int32) % 200)


def decoding(num_seqs: int, stream: bool = False, **way) -> LLMEngine:
    """An engine some steps into the answers of so many requests."""
    room = EngineConfig(
        "cpu", num_blocks=300, max_seq_len=128, max_num_tokens=8192, max_num_seqs=num_seqs
    )
    llm = LLMEngine(NoModel(), CONFIGS["toy"], room)
    params = SamplingParams(max_tokens=50, ignore_eos=True, **way)
    for i in range(num_seqs):
        llm.add_request(str(i), [1, 2, 3], params, stream=stream)
    for _ in range(4):
        llm.step()
    return llm


def lines_of_a_step(llm: LLMEngine) -> Counter[str]:
    """How often each line of engine/ is run by a step."""
    lines: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, _: object):
        if not frame.f_code.co_filename.startswith(ENGINE):
            return None
        if event == "line":
            lines[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        llm.step()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_decode_step_of_many_rows_runs_the_lines_of_one_of_few(way: dict):
    few, many = (lines_of_a_step(decoding(count, **way)) for count in (2, 256))

    assert many == few
    assert 30 < sum(many.values()) < 300


def test_a_loop_over_rows_would_be_seen():
    few, many = (lines_of_a_step(decoding(count, stream=True)) for count in (2, 256))

    assert sum(many.values()) > 10 * sum(few.values())
