"""The step-wise engine: what it gives back and when, and everything that it refuses at the door."""

import math
from dataclasses import replace

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.errors import EngineError, InvalidArgument, QueueFull
from engine.llm_engine import LLMEngine
from engine.models import resolve
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from engine.sources.toy import CONFIGS
from engine.tokenizer import Tokenizer
from tests.engine.paged_token_model import AtOnce, Output, PagedTokenModel

EOS, EOT = 57, 59
CONFIG = replace(CONFIGS["toy"], eos_token_ids=(EOS, EOT), max_position_embeddings=200)
ROOM = EngineConfig(
    device="cpu", block_size=16, num_blocks=10, max_seq_len=180, max_num_tokens=64, max_num_seqs=4
)
GREEDY = SamplingParams(temperature=0, max_tokens=4)
PROMPT = [10, 11, 12]


class Scripted(AtOnce):
    """Answers every row with the next letters of one text, which is bytes."""

    def __init__(self, text: bytes) -> None:
        self.text, self.place = text, 0

    def forward(self, batch, *, sampling, wants_logits) -> Output:
        rows = len(batch.logits_indices)
        token = self.text[self.place]
        self.place += rows > 0
        return Output(np.zeros((rows, 1)), np.full(rows, token, np.int32))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(resolve("toy"))


def make(tokenizer: Tokenizer | None, text: bytes = b"x" * 99, **options) -> LLMEngine:
    return LLMEngine(Scripted(text), CONFIG, ROOM, tokenizer, **options)


def run(engine: LLMEngine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def test_a_streamed_request_gives_an_output_per_token_and_others_only_the_last(tokenizer):
    engine = make(tokenizer, b"abcdefgh")
    engine.add_request("s", PROMPT, GREEDY)
    engine.add_request("q", PROMPT, GREEDY, stream=False)

    outputs = run(engine)

    streamed = [o.outputs[0] for o in outputs if o.request_id == "s"]
    assert [o.text for o in streamed] == ["a", "ab", "abc", "abcd"]
    assert [o.delta for o in streamed] == ["a", "b", "c", "d"]
    assert [o.finish_reason for o in streamed] == [None, None, None, "length"]
    (last,) = [o for o in outputs if o.request_id == "q"]
    assert (last.outputs[0].text, last.outputs[0].delta) == ("abcd", "abcd")
    assert last.finished and last.outputs[0].token_ids == tuple(b"abcd")
    assert last.usage.num_prompt_tokens == 3
    assert last.usage.num_completion_tokens == 4
    assert last.usage.num_total_tokens == 7


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("options", "text", "ids", "reason", "stop_reason"),
    [
        ({}, "ab", b"ab9", "stop", None),
        ({"ignore_eos": True}, "ab9cXYef", b"ab9cXYef", "length", None),
        ({"ignore_eos": True, "stop": "cX"}, "ab9", b"ab9cX", "stop", "cX"),
        ({"ignore_eos": True, "stop": ["Xq", "9cXYZ", "Y"]}, "ab9cX", b"ab9cXY", "stop", "Y"),
        ({"ignore_eos": True, "stop": "cX", "include_stop_str_in_output": True},
         "ab9cX", b"ab9cX", "stop", "cX"),
        ({"ignore_eos": True, "stop_token_ids": [ord("c")]}, "ab9", b"ab9c", "stop", ord("c")),
        ({"ignore_eos": True, "stop_token_ids": [ord("c")], "include_stop_str_in_output": True},
         "ab9c", b"ab9c", "stop", ord("c")),
        ({"ignore_eos": True, "stop": "b", "min_tokens": 2}, "ab9cXYef", b"ab9cXYef",
         "length", None),
        ({"ignore_eos": True, "stop": "9", "min_tokens": 2}, "ab", b"ab9", "stop", "9"),
        ({"ignore_eos": True, "stop": "f"}, "ab9cXYe", b"ab9cXYef", "stop", "f"),
        ({"ignore_eos": True, "stop": "fg"}, "ab9cXYef", b"ab9cXYef", "length", None),
    ],
)  # fmt: skip
def test_what_ends_an_answer_and_what_its_text_is(
    tokenizer, stream, options, text, ids, reason, stop_reason
):
    # 9 is an end token of this model; seen with min_tokens=2 only where nothing bans it
    engine = make(tokenizer, b"ab9cXYefgh")
    params = SamplingParams(temperature=0, max_tokens=8, **options)
    engine.add_request("r", PROMPT, params, stream=stream)

    outputs = run(engine)

    answer = outputs[-1].outputs[0]
    assert (answer.text, answer.token_ids) == (text, tuple(ids))
    assert (answer.finish_reason, answer.stop_reason) == (reason, stop_reason)
    assert "".join(output.outputs[0].delta for output in outputs) == text


def test_each_end_token_of_the_model_ends_an_answer(tokenizer):
    for end in (EOS, EOT):
        engine = make(tokenizer, bytes([97, end, 98]))
        engine.add_request("r", PROMPT, GREEDY)

        assert run(engine)[-1].outputs[0].token_ids == (97, end)


def test_text_and_ids_are_read_alike(tokenizer):
    by_text, by_ids = make(tokenizer), make(tokenizer)
    ids = tokenizer.encode("hey", add_bos=tokenizer.adds_bos)
    by_text.add_request("r", "hey", GREEDY)
    by_ids.add_request("r", {"prompt_token_ids": ids}, GREEDY)

    first, second = run(by_text)[-1], run(by_ids)[-1]

    assert first.prompt_token_ids == second.prompt_token_ids == tuple(ids)
    assert (first.prompt, second.prompt) == ("hey", None)


def test_an_array_of_ids_is_a_prompt(tokenizer):
    engine = make(tokenizer)
    engine.add_request("r", np.array(PROMPT, np.int64), GREEDY)

    assert run(engine)[-1].prompt_token_ids == tuple(PROMPT)


def test_a_seed_that_nobody_gave_is_told(tokenizer):
    engine = make(tokenizer)
    engine.add_request("a", PROMPT, GREEDY)
    engine.add_request("b", PROMPT, replace(GREEDY, seed=7))

    seeds = {output.request_id: output.seed for output in run(engine)}

    assert seeds["b"] == 7
    assert 0 <= seeds["a"] < 2**64


def test_the_answers_of_one_request_are_drawn_each_for_itself(tokenizer):
    model = PagedTokenModel(ROOM.num_blocks, ROOM.block_size, 200)
    engine = LLMEngine(model, CONFIG, ROOM, tokenizer)
    engine.add_request("r", PROMPT, SamplingParams(n=3, seed=1, max_tokens=6), stream=False)

    (output,) = run(engine)

    assert len({answer.token_ids for answer in output.outputs}) == 3


def test_penalties_count_each_token_of_the_answer(tokenizer):
    """A schedule cannot show this: a request that forgets its tokens does so alone, too."""
    engine = make(tokenizer, b"aab" + b"c" * 9)
    seen = []
    works = engine.runner.forward

    def watched(batch, *, sampling, wants_logits):
        first, count = sampling.rows[0][["first_edit", "num_edits"]]
        edits = sampling.edits[first : first + count]
        seen.append(dict(edits[["token_id", "count"]].tolist()))
        return works(batch, sampling=sampling, wants_logits=wants_logits)

    engine.runner.forward = watched
    params = SamplingParams(temperature=0, max_tokens=4, frequency_penalty=0.5)
    engine.add_request("r", PROMPT, params, stream=False)
    run(engine)

    a, b = b"ab"
    assert seen == [{}, {a: 1}, {a: 2}, {a: 2, b: 1}]


def test_abort_tells_what_was_answered_and_unknown_names_are_no_error(tokenizer):
    engine = make(tokenizer, b"abcdef")
    engine.add_request("r", PROMPT, GREEDY)
    engine.add_request("waits", PROMPT, GREEDY)
    engine.step()
    engine.step()

    (output,) = engine.abort("r")

    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("ab", "abort")
    assert engine.abort(["r", "nobody"]) == []
    assert len(engine.abort(["waits"])) == 1
    assert not engine.has_unfinished_requests()
    assert engine.step() == []
    engine.scheduler.check_integrity()


def test_a_name_may_be_used_again_once_its_request_has_ended(tokenizer):
    engine = make(tokenizer)
    engine.add_request("r", PROMPT, GREEDY)
    run(engine)

    engine.add_request("r", PROMPT, GREEDY)

    assert run(engine)[-1].finished


class Huge(int):
    """An integer that is no plain one."""


@pytest.mark.parametrize(
    ("request_id", "prompt", "params", "priority", "message"),
    [
        ("", PROMPT, GREEDY, 0, "request_id must be a string of 1 to 256"),
        ("x" * 257, PROMPT, GREEDY, 0, "request_id must be a string of 1 to 256"),
        (7, PROMPT, GREEDY, 0, "request_id must be .* got 7"),
        ("taken", PROMPT, GREEDY, 0, "request_id 'taken' is that of an unfinished"),
        ("r", PROMPT, {"n": 2}, 0, "params must be SamplingParams"),
        ("r", PROMPT, GREEDY, 1001, "priority must be .* from -1000 to 1000, got 1001"),
        ("r", PROMPT, GREEDY, -1001, "priority must be .* got -1001"),
        ("r", PROMPT, GREEDY, 0.5, "priority must be an integer .* got 0.5"),
        ("r", PROMPT, GREEDY, math.nan, "priority must be an integer .* got nan"),
        ("r", PROMPT, GREEDY, True, "priority must be an integer .* got True"),
        ("r", [], GREEDY, 0, "prompt must have at least 1 token, got 0"),
        ("r", [1, -1], GREEDY, 0, r"prompt\[1\] must be a token id from 0 to 319, got -1"),
        ("r", [320], GREEDY, 0, r"prompt\[0\] must be a token id from 0 to 319, got 320"),
        ("r", [2**70], GREEDY, 0, r"prompt\[0\] must be a token id"),
        ("r", [1.0], GREEDY, 0, r"prompt\[0\] must be a token id .* got 1.0"),
        ("r", [math.inf], GREEDY, 0, r"prompt\[0\] must be a token id .* got inf"),
        ("r", [True], GREEDY, 0, r"prompt\[0\] must be a token id .* got True"),
        ("r", ["a"], GREEDY, 0, r"prompt\[0\] must be a token id .* got 'a'"),
        ("r", np.zeros((2, 2), np.int32), GREEDY, 0, r"prompt\[0\] must be a token id"),
        ("r", None, GREEDY, 0, "prompt must be a text or token ids, got None"),
        ("r", b"ab", GREEDY, 0, "prompt must be a text or token ids, got b'ab'"),
        ("r", {1, 2}, GREEDY, 0, "prompt must be a text or token ids"),
        ("r", {"prompt": [1]}, GREEDY, 0, "prompt is of the wrong type"),
        ("r", {"prompt_token_ids": "a"}, GREEDY, 0, "prompt_token_ids is of the wrong type"),
        ("r", {"text": "a"}, GREEDY, 0, "either 'prompt' or 'prompt_token_ids'"),
        ("r", {"prompt": "a", "prompt_token_ids": [1]}, GREEDY, 0, "either 'prompt' or"),
        ("r", "\ud800", GREEDY, 0, "valid Unicode"),
        ("r", [1] * 180, GREEDY, 0, "prompt must have at most 179 tokens .* got 180"),
        ("r", [1] * 177, GREEDY, 0, "max_tokens must be from 1 to 3 .* got 4"),
        ("r", [1] * 160, SamplingParams(max_tokens=3), 0, "slots of the KV cache, which has 160"),
        ("r", [1] * 170, SamplingParams(max_tokens=None), 0, "slots of the KV cache"),
        ("r", PROMPT, SamplingParams(stop_token_ids=[320]), 0, "stop_token_ids must name ids"),
        ("r", PROMPT, SamplingParams(logit_bias={320: 1}), 0, "logit_bias must name ids"),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_by_name_and_harms_nobody(
    tokenizer, request_id, prompt, params, priority, message
):
    lonely = make(tokenizer, b"abcdefgh")
    lonely.add_request("taken", PROMPT, GREEDY)
    expected = run(lonely)
    engine = make(tokenizer, b"abcdefgh")
    engine.add_request("taken", PROMPT, GREEDY)
    outputs = engine.step()

    with pytest.raises(InvalidArgument, match=message):
        engine.add_request(request_id, prompt, params, priority)

    engine.scheduler.check_integrity()
    outputs += run(engine)
    assert [o.outputs for o in outputs] == [o.outputs for o in expected]


def test_without_a_tokenizer_text_and_stop_strings_are_refused():
    engine = make(None)

    with pytest.raises(InvalidArgument, match="prompt must be token ids"):
        engine.add_request("r", "hello", GREEDY)
    with pytest.raises(InvalidArgument, match="stop must be empty"):
        engine.add_request("r", PROMPT, SamplingParams(stop="x"))
    engine.add_request("r", PROMPT, GREEDY)
    assert run(engine)[-1].outputs[0].text == ""


def test_a_full_queue_refuses_and_takes_requests_again_later(tokenizer):
    engine = make(tokenizer, max_waiting=2)
    engine.add_request("a", PROMPT, GREEDY)
    engine.add_request("b", PROMPT, GREEDY)

    with pytest.raises(QueueFull, match="at most 2 sequences may wait, got 3"):
        engine.add_request("c", PROMPT, GREEDY)
    engine.step()
    engine.add_request("c", PROMPT, GREEDY)

    assert {output.request_id for output in run(engine)} == {"a", "b", "c"}


def test_max_tokens_none_is_as_much_as_context_and_cache_hold(tokenizer):
    engine = make(tokenizer, b"x" * 300)
    engine.add_request("r", PROMPT, SamplingParams(temperature=0, max_tokens=None))

    # 160 slots in the cache; the last token needs none
    assert len(run(engine)[-1].outputs[0].token_ids) == 160 + 1 - len(PROMPT)


def test_a_failed_step_changes_nothing_and_can_be_tried_again(tokenizer):
    engine = make(tokenizer, b"abcdefgh")
    engine.add_request("r", PROMPT, GREEDY)
    engine.step()
    works = engine.runner.forward

    def fails(*_, **__):
        raise EngineError("the device is busy")

    engine.runner.forward = fails
    with pytest.raises(EngineError, match="busy"):
        engine.step()
    engine.scheduler.check_integrity()
    engine.runner.forward = works

    assert run(engine)[-1].outputs[0].text == "abcd"
