"""The arrays of a step's sampling, against counting from scratch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from engine.sampling import (
    DRAWN,
    EDIT,
    EDIT_BANNED,
    EDIT_SEEN,
    NO_LOGPROBS,
    ROW,
    IgnoredRow,
    Logprobs,
    PromptToken,
    SequenceSampler,
    build_sampling,
    spread,
)
from engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)
IDS = st.lists(st.integers(0, 12), min_size=1, max_size=40)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.5, 1]),
    repetition_penalty=st.sampled_from([1, 1.5]),
    presence_penalty=st.sampled_from([0, 0.5]),
    frequency_penalty=st.sampled_from([0, -0.25]),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 12), st.sampled_from([-3.0, 2.5])),
    stop_token_ids=st.lists(st.integers(0, 12), max_size=3),
    min_tokens=st.integers(0, 6),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)


def expected_edits(params, prompt, output, eos) -> dict[int, tuple[int, float, int]]:
    """Every id whose logit changes: times in the answer, bias, flags."""
    counts = Counter(output) if params.has_penalties else Counter()
    seen = set(counts) | (set(prompt) if params.repetition_penalty != 1 else set())
    bias = params.logit_bias or {}
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    banned = ends if len(output) < params.min_tokens else set()
    return {
        i: (counts[i], bias.get(i, 0.0), EDIT_SEEN * (i in seen) | EDIT_BANNED * (i in banned))
        for i in seen | set(bias) | banned
    }


def without_neutral(edits: np.ndarray) -> dict[int, tuple[int, float, int]]:
    """Edits by token id, without those that change nothing."""
    by_id = {
        int(e["token_id"]): (int(e["count"]), float(e["bias"]), int(e["flags"])) for e in edits
    }
    assert len(by_id) == len(edits), "an id twice"
    return {i: edit for i, edit in by_id.items() if edit[1] or edit[2]}


@given(PARAMS, IDS, IDS, st.lists(st.integers(0, 12), max_size=3))
def test_edits_are_those_counted_from_scratch_after_every_token(params, prompt, output, eos):
    sampler = SequenceSampler(params, prompt, seed=1, eos_token_ids=eos)

    for length in range(len(output) + 1):
        batch = build_sampling([sampler])
        expected = expected_edits(params, prompt, output[:length], eos)
        if batch is None:
            assert params.temperature == 0 and params.logprobs is None and not expected
        else:
            wanted = {i: edit for i, edit in expected.items() if edit[1] or edit[2]}
            assert without_neutral(batch.edits) == wanted
            assert batch.rows["num_edits"].tolist() == [len(batch.edits)]
            assert batch.rows["position"].tolist() == [len(prompt) + length]
        if length < len(output):
            sampler.append(output[length])


@given(PARAMS, IDS, IDS, st.data())
def test_a_sampler_made_again_from_the_ids_gives_the_same_arrays(params, prompt, output, data):
    cut = data.draw(st.integers(0, len(output)))
    whole = SequenceSampler(params, prompt, 7, 1, (3, 5), output)
    resumed = SequenceSampler(params, prompt, 7, 1, (3, 5), output[:cut])
    for token_id in output[cut:]:
        resumed.append(token_id)

    left, right = build_sampling([whole]), build_sampling([resumed])

    assert (left is None) == (right is None)
    if left is not None:
        assert left.rows.tobytes() == right.rows.tobytes()
        assert left.edits.tobytes() == right.edits.tobytes()


def test_rows_are_stacked_in_order_with_their_edits():
    drawn = SequenceSampler(
        SamplingParams(temperature=0.5, top_k=3, top_p=0.75), [1, 2], seed=2**64 - 1
    )
    biased = SequenceSampler(
        SamplingParams(temperature=0, logit_bias={4: 1.5, 9: -2.0}), [1], seed=5, choice=3
    )  # fmt: skip
    scored = PromptToken(token_id=17, num_logprobs=2)

    batch = build_sampling([drawn, IgnoredRow(), biased, scored])

    assert batch is not None
    assert batch.rows["seed"].tolist() == [2**64 - 1, 0, 5, 0]
    assert batch.rows["position"].tolist() == [2, 0, 1, 0]
    assert batch.rows["choice"].tolist() == [0, 0, 3, 0]
    assert batch.rows["temperature"].tolist() == [0.5, 0, 0, 0]
    assert batch.rows["top_k"].tolist() == [3, 0, 0, 0]
    assert batch.rows["top_p"].tolist() == [0.75, 1, 1, 1]
    assert batch.rows["repetition_penalty"].tolist() == [1, 1, 1, 1]
    assert batch.rows["num_edits"].tolist() == [0, 0, 2, 0]
    assert batch.edits["token_id"].tolist() == [4, 9]
    assert batch.edits["bias"].tolist() == [1.5, -2.0]
    assert batch.rows["num_logprobs"].tolist() == [NO_LOGPROBS] * 3 + [2]
    assert batch.rows["scored_id"].tolist() == [DRAWN] * 3 + [17]
    assert batch.max_logprobs == 2


def test_each_rows_edits_begin_behind_those_of_the_rows_before():
    biases = ({4: 1.5, 9: -2.0}, {}, {7: 1.0}, {8: 0.5})
    rows = [SequenceSampler(SamplingParams(logit_bias=bias), [1], seed=5) for bias in biases]

    batch = build_sampling(rows)

    assert batch is not None
    assert batch.rows["first_edit"].tolist() == [0, 2, 2, 3]
    assert batch.edits["token_id"].tolist() == [4, 9, 7, 8]


def test_sampled_rows_lie_between_scored_and_ignored_ones():
    biased = SequenceSampler(SamplingParams(logit_bias={4: 1.5}), [1], seed=5)
    drawn = SequenceSampler(SamplingParams(), [1, 2], seed=6)
    scored = PromptToken(token_id=17, num_logprobs=2)

    found = spread(build_sampling([biased, drawn]), np.array([1, 4]), 5, {2: scored})

    rows = [IgnoredRow(), biased, scored, IgnoredRow(), drawn]
    expected = build_sampling(rows)
    assert found is not None and expected is not None
    for name in ROW.names:
        if name != "first_edit":
            assert found.rows[name].tolist() == expected.rows[name].tolist(), name
    assert found.rows["first_edit"][1] == 0 and found.edits.tobytes() == expected.edits.tobytes()
    assert found.max_logprobs == 2


@pytest.mark.parametrize("scored", [{}, {0: PromptToken(3, 0)}])
def test_greedy_rows_need_arrays_only_beside_scored_ones(scored: dict):
    found = spread(None, np.array([1]), 2, scored)

    if scored:
        assert found is not None and found.rows["num_logprobs"].tolist() == [0, NO_LOGPROBS]
        assert found.rows["temperature"].tolist() == [0, 0] and found.max_logprobs == 0
    else:
        assert found is None


def test_many_edits_survive_the_growth_of_their_array():
    params = SamplingParams(repetition_penalty=1.5)
    batch = build_sampling([SequenceSampler(params, range(1000), seed=0, output_ids=[3] * 5)])

    assert batch is not None
    assert batch.edits["token_id"].tolist() == list(range(1000))
    assert batch.edits["count"].tolist() == [0, 0, 0, 5] + [0] * 996
    assert (batch.edits["flags"] == EDIT_SEEN).all()


@pytest.mark.parametrize(
    ("change", "is_plain"),
    [
        ({}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.5, "seed": 3}, True),  # of no use
        ({"min_tokens": 3}, False),
        ({"min_tokens": 3, "ignore_eos": True}, True),
        ({"logprobs": 0}, False),
        ({"logit_bias": {1: 2.0}}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"temperature": 0.5}, False),
    ],
)  # fmt: skip
def test_greedy_rows_need_no_arrays(change: dict, is_plain: bool):
    params = SamplingParams(**({"temperature": 0} | change))
    sampler = SequenceSampler(params, [1, 2], seed=0, eos_token_ids=[2])

    assert sampler.is_plain is is_plain
    assert (build_sampling([sampler, IgnoredRow()]) is None) is is_plain


def test_without_logprobs_no_row_has_alternatives():
    batch = build_sampling([SequenceSampler(SamplingParams(), [1], seed=0)])

    assert batch is not None and batch.max_logprobs is None


@pytest.mark.parametrize("num_logprobs", [-1, 21])
def test_a_prompt_row_has_at_most_so_many_alternatives(num_logprobs: int):
    with pytest.raises(
        InvalidArgument, match=f"num_logprobs must be from 0 to 20, got {num_logprobs}"
    ):
        PromptToken(1, num_logprobs)


def test_an_empty_prompt_is_refused():
    with pytest.raises(InvalidArgument, match="prompt must have at least 1 token, got 0"):
        SequenceSampler(GREEDY, [], seed=0)


def test_logprobs_start_as_not_asked():
    logprobs = Logprobs.empty(2, 3)

    assert np.isnan(logprobs.token_logprobs).all() and logprobs.token_logprobs.shape == (2,)
    assert (logprobs.top_ids == -1).all() and logprobs.top_ids.shape == (2, 3)
    assert logprobs.top_logprobs.dtype == np.float32 and logprobs.token_ranks.dtype == np.int32


def test_an_edit_is_four_words():
    # the columns of the growing array are its fields
    assert EDIT.itemsize == 16 and [EDIT.fields[name][1] for name in EDIT.names] == [0, 4, 8, 12]
