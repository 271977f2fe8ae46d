"""A step in two calls is the step in one, whatever happens to the arrays in between."""

from collections.abc import Callable

import numpy as np
import pytest

from engine.batch import Batch, SequenceSlice, build_batch
from engine.errors import InvalidArgument
from engine.model_runner import ModelRunner, StepOutput
from engine.sampling import PromptToken, SamplingBatch, SequenceSampler, build_sampling
from engine.sampling_params import SamplingParams
from tests.devices import skipped_without_device
from tests.system.trace import tokens
from tests.twin.bits import assert_same_bits

PROMPT = tokens(0, 40)
DRAWN = SamplingParams(temperature=0.8, top_k=9, frequency_penalty=0.5, logprobs=3)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def runner(request: pytest.FixtureRequest, make_runner: Callable[..., ModelRunner]) -> ModelRunner:
    with skipped_without_device():
        return make_runner("toy", num_blocks=48, max_seq_len=64, device=request.param)


def prefill(logits: str = "last") -> Batch:
    return build_batch([SequenceSlice(PROMPT, 0, [0, 1, 2])], 16, logits)


def decode(count: int) -> Batch:
    rows = [SequenceSlice([7 + i], 0, [i]) for i in range(count)]
    return build_batch(rows, 16)


def drawn(count: int) -> SamplingBatch:
    return build_sampling([SequenceSampler(DRAWN, PROMPT, i, output_ids=[3]) for i in range(count)])


def scored_prompt() -> SamplingBatch:
    """More rows than are computed at once: slices whose results are collected on the way."""
    return build_sampling([PromptToken(token, 2) for token in PROMPT])


STEPS = {
    "a prefill": (prefill, lambda: None),
    "a prefill without rows": (lambda: prefill("none"), lambda: None),
    "a prompt scored in slices": (lambda: prefill("all"), scored_prompt),
    "one decodes": (lambda: decode(1), lambda: None),
    "many decode": (lambda: decode(8), lambda: None),
    "many are drawn and scored": (lambda: decode(8), lambda: drawn(8)),
}


def assert_same(first: StepOutput, second: StepOutput) -> None:
    assert first.next_ids.tolist() == second.next_ids.tolist()
    if first.logits is not None:
        assert_same_bits(first.logits, second.logits)
    assert (first.logprobs is None) == (second.logprobs is None)
    for name, array in vars(first.logprobs).items() if first.logprobs else ():
        np.testing.assert_array_equal(array, getattr(second.logprobs, name))


@pytest.mark.parametrize("wants_logits", [True, False])
@pytest.mark.parametrize(("make", "sampling"), STEPS.values(), ids=STEPS)
def test_two_calls_are_one_though_the_arrays_change_meanwhile(
    runner: ModelRunner, make, sampling, wants_logits: bool
):
    expected = runner.forward(make(), sampling=sampling(), wants_logits=wants_logits)
    batch, asked = make(), sampling()

    runner.begin(batch, asked, wants_logits)
    for array in vars(batch).values():
        array.fill(-1)
    output = runner.end()

    assert_same(output, expected)


def test_steps_follow_one_another(runner: ModelRunner):
    expected = [runner.forward(decode(count)) for count in (3, 8, 1)]

    for count, other in zip((3, 8, 1), expected, strict=True):
        runner.begin(decode(count))
        assert_same(runner.end(), other)


def test_between_the_two_no_step_may_begin_and_the_refusal_harms_nobody(runner: ModelRunner):
    expected = runner.forward(decode(3))
    runner.begin(decode(3))

    for begin in (runner.begin, runner.forward, lambda batch: runner.engine.decode(batch, 1)):
        with pytest.raises(InvalidArgument, match="engine_forward_end comes first"):
            begin(decode(3))

    assert_same(runner.end(), expected)
    assert_same(runner.forward(decode(3)), expected)


def test_what_was_not_begun_cannot_end(runner: ModelRunner):
    with pytest.raises(InvalidArgument, match="no step was begun"):
        runner.end()
    refused = decode(2)
    refused.positions[0] = 5
    with pytest.raises(InvalidArgument, match="positions"):
        runner.begin(refused)
    with pytest.raises(InvalidArgument, match="no step was begun"):
        runner.end()


def test_an_engine_may_be_closed_in_between(library, runner: ModelRunner):
    with ModelRunner(runner.directory, runner.engine_config, library) as other:
        other.begin(decode(8), drawn(8), wants_logits=False)
