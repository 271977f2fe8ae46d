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

VOCAB = 4096


class NoModel(AtOnce):
    """Lays out what the C call takes, and answers at once."""

    def __init__(self, library) -> None:
        self.step = StepStruct(library, VOCAB)
        self.answers = np.random.default_rng(1).integers(8, VOCAB, (512, 256), dtype=np.int32)
        self.num_steps = 0

    def forward(self, batch, *, sampling, wants_logits) -> StepOutput:
        self.num_steps += 1
        next_ids = self.answers[self.num_steps % 512, : len(batch.logits_indices)]
        self.step.fill(batch, None, next_ids, sampling, None)
        return StepOutput(None, next_ids)


def serving(library, num_seqs: int, params: SamplingParams, lengths: list[int]) -> LLMEngine:
    """An engine in which all these prompts decode."""
    room = EngineConfig(
        "cpu", num_blocks=8000, max_seq_len=4096, max_num_tokens=2048, max_num_seqs=num_seqs
    )
    config = replace(CONFIGS["toy"], max_position_embeddings=4096, vocab_size=VOCAB)
    engine = LLMEngine(NoModel(library), config, room)
    prompts = np.random.default_rng(0).permuted(np.tile(np.arange(VOCAB), (num_seqs, 1)), axis=1)
    for name, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add_request(str(name), prompt[:length].tolist(), params, stream=False)
    while engine.scheduler.waiting or engine.scheduler._remaining().max() > 1:
        engine.step()
    return engine


@pytest.mark.parametrize("num_seqs", [1, 64, 256])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
def test_host_work_of_a_decode_step(
    benchmark, rate, library, num_seqs: int, temperature: float
) -> None:
    benchmark.group = "host work of a decode step"
    params = SamplingParams(temperature=temperature, max_tokens=3500, ignore_eos=True)
    lengths = np.random.default_rng(0).integers(128, 512, num_seqs).tolist()

    rate(serving(library, num_seqs, params, lengths).step, 1, "steps/s", rounds=1000)


def test_host_work_of_a_decode_step_of_penalised_rows(benchmark, rate, library) -> None:
    benchmark.group = "host work of a decode step"
    params = SamplingParams(repetition_penalty=1.1, max_tokens=3000, ignore_eos=True)

    rate(serving(library, 256, params, [500] * 256).step, 1, "steps/s", rounds=200)
