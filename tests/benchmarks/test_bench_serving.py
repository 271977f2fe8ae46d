"""The host's work per step of serving: policy, arrays and pointers, without the model."""

from dataclasses import replace

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.model_runner import StepOutput
from engine.sampling_params import SamplingParams
from engine.sources.toy import CONFIGS
from engine.step_struct import StepStruct
from tests.engine.paged_token_model import AtOnce


class NoModel(AtOnce):
    """Lays out what the C call takes, and answers at once."""

    def __init__(self, library) -> None:
        self.step = StepStruct(library, CONFIGS["toy"].vocab_size)

    def forward(self, batch, *, sampling, wants_logits) -> StepOutput:
        next_ids = np.full(len(batch.logits_indices), 7, np.int32)
        self.step.fill(batch, None, next_ids, sampling, None)
        return StepOutput(None, next_ids)


@pytest.mark.parametrize("num_seqs", [1, 64, 256])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
def test_host_work_of_a_decode_step(
    benchmark, rate, library, num_seqs: int, temperature: float
) -> None:
    benchmark.group = "host work of a decode step"
    room = EngineConfig(
        "cpu", num_blocks=8000, max_seq_len=4096, max_num_tokens=2048, max_num_seqs=num_seqs
    )
    config = replace(CONFIGS["toy"], max_position_embeddings=4096)
    engine = LLMEngine(NoModel(library), config, room)
    lengths = np.random.default_rng(0).integers(128, 512, num_seqs).tolist()
    params = SamplingParams(temperature=temperature, max_tokens=3500, ignore_eos=True)
    for name, length in enumerate(lengths):
        engine.add_request(str(name), [name % 256] * length, params, stream=False)
    while engine.scheduler.waiting or engine.scheduler._remaining().max() > 1:
        engine.step()

    rate(engine.step, 1, "steps/s", rounds=1000)
