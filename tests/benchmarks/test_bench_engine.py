"""Whole steps: the toy for what a step costs beside arithmetic, a trained model for the rest."""

import pytest

from engine.batch import SequenceSlice, build_batch
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import cache_root, resolve
from tests.system.trace import tokens

PROMPT = 128


@pytest.fixture(scope="module")
def smollm2(library):
    if not any(cache_root().glob("smollm2-135m-*/model.safetensors")):
        pytest.skip("requires smollm2-135m in the model cache: make verify fetches it")
    room = EngineConfig("cpu", num_blocks=4, max_seq_len=512, max_num_tokens=PROMPT, max_num_seqs=1)
    with ModelRunner(resolve("smollm2-135m"), room, library) as runner:
        yield runner


@pytest.mark.parametrize("num_tokens", [1, 32])
def test_toy_step(benchmark, rate, make_runner, num_tokens: int):
    benchmark.group = "a step of the toy, every core"
    runner = make_runner()
    batch = build_batch([SequenceSlice(tokens(0, num_tokens), 0, list(range(8)))], 16)

    rate(lambda: runner.forward(batch), num_tokens, "tokens/s", rounds=20)


def test_smollm2_prefill(benchmark, rate, smollm2):
    benchmark.group = "smollm2-135m, every core"
    batch = build_batch([SequenceSlice(tokens(0, PROMPT), 0, [0, 1])], 128)

    rate(lambda: smollm2.forward(batch), PROMPT, "tokens/s", rounds=3)


def test_smollm2_decode(benchmark, rate, smollm2):
    benchmark.group = "smollm2-135m, every core"
    smollm2.forward(build_batch([SequenceSlice(tokens(0, PROMPT), 0, [0, 1])], 128))
    batch = build_batch([SequenceSlice([5], PROMPT, [0, 1])], 128)

    rate(lambda: smollm2.forward(batch), 1, "tokens/s", rounds=5)
