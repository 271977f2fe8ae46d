import numpy as np

from engine.outputs import Usage
from engine.request import Request
from engine.sampling import Logprobs
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.sources.toy import byte_tokenizer
from engine.tokenizer import Tokenizer


def request(params: SamplingParams, tokenizer: Tokenizer | None = None) -> Request:
    sequence = Sequence("a", [1], max_num_tokens=9)
    return Request("a", None, params, 0, [sequence], tokenizer, is_streamed=False)


def test_the_chosen_token_comes_first_and_keeps_its_own_rank():
    found = Logprobs(
        token_logprobs=np.array([-3.0], np.float32),
        token_ranks=np.array([7], np.int32),
        top_ids=np.array([[5, 4]], np.int32),
        top_logprobs=np.array([[-1.0, -2.0]], np.float32),
    )

    scores = request(SamplingParams(logprobs=2)).token_logprobs(found, 0, 3, 2)

    assert [(i, s.logprob, s.rank) for i, s in scores.items()] == [
        (3, -3.0, 7),
        (5, -1.0, 1),
        (4, -2.0, 2),
    ]


def test_a_vocabulary_with_fewer_tokens_than_were_asked_for_gives_those_it_has():
    found = Logprobs(
        token_logprobs=np.array([-1.0], np.float32),
        token_ranks=np.array([1], np.int32),
        top_ids=np.array([[0, 1, -1]], np.int32),
        top_logprobs=np.array([[-1.0, -2.0, np.nan]], np.float32),
    )

    scores = request(SamplingParams(logprobs=3)).token_logprobs(found, 0, 0, 3)

    assert list(scores) == [0, 1]


def test_each_scored_token_has_its_text_where_the_model_has_text():
    params, token_id = SamplingParams(logprobs=0), ord("x")
    found = Logprobs.empty(1, 0)

    with_text = request(params, Tokenizer(byte_tokenizer(320))).token_logprobs(
        found, 0, token_id, 0
    )
    without = request(params).token_logprobs(found, 0, token_id, 0)

    assert (with_text[token_id].decoded_token, without[token_id].decoded_token) == ("x", None)


def test_usage_adds_prompt_and_answers():
    assert request(SamplingParams()).output().usage.num_total_tokens == 1
    assert Usage(5, 0, 7, 0).num_total_tokens == 12
