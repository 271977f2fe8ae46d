import numpy as np

from engine.request import Request
from engine.sampling import Logprobs
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence


def request(params: SamplingParams) -> Request:
    sequence = Sequence("a", [1], max_num_tokens=9)
    return Request("a", None, params, 0, [sequence], tokenizer=None, is_streamed=False)


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
