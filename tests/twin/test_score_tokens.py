"""Log-probabilities against float64, ranks and alternatives against a sort."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.ops import Ops
from engine.sampling import EDIT, EDIT_BANNED, Logprobs
from tests.twin import sampling_contract as page

U24 = 2.0**-24  # the rounding of a float32 operation, relative
EXP2_ERROR = 1.14 * U24  # csrc/common/numerics.h
VALUE = st.sampled_from([-math.inf, -1.0, 0.0, -0.0, 1.0, 2.5]) | st.floats(-30, 30, width=32)


def score(ops: Ops, logits: np.ndarray, num_logprobs: int, scored_id: object = -1) -> Logprobs:
    rows = page.rows(
        len(logits), temperature=0, num_logprobs=num_logprobs, scored_id=scored_id
    )  # fmt: skip
    logprobs = ops.sample(logits, page.sampling(rows, max_logprobs=num_logprobs))[1]
    assert logprobs is not None
    return logprobs


def truth(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of each row in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def budget(logits: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """The largest error of a row's log-probabilities, [num_rows, 1].

    A weight exp2(t), t = rn(rn(x - m) * rn(log2 e)), is off by exp2's own error, by two roundings
    and that of the constant on t (times ln 2 in the result), and by less than a unit of 2^-38. The
    mass is off by no more than the sum of these; ln has slope 1 / mass. The last rounding is that
    of the result.
    """
    d = logits.astype(np.float64) - logits.max(-1, keepdims=True).astype(np.float64)
    p = np.exp(d)
    t = np.where(np.isfinite(d), np.abs(d), 0)
    of_weights = (p * (EXP2_ERROR + 3 * U24 * t * 1.01)).sum(-1) + logits.shape[1] * 2.0**-38
    of_result = np.where(np.isfinite(logprobs), np.abs(logprobs), 0).max(-1) * U24 + 1e-12
    return (of_weights / p.sum(-1) * 1.0001 + of_result)[:, None]


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 20])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_the_probabilities_of_a_whole_vocabulary_add_up_to_one(
    twin: Ops, vocab_size: int, scale: float
):
    logits = np.random.default_rng(2).standard_normal((4, vocab_size)) * scale
    logits = logits.astype(np.float32)

    result = score(twin, logits, vocab_size)

    sums = np.exp(result.top_logprobs.astype(np.float64)).sum(-1)
    error = budget(logits, result.top_logprobs)[:, 0]  # of each, so of their sum at most
    assert (np.abs(sums - 1) <= 1.01 * error).all()


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 1000, 128256])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_logprobs_are_within_the_derived_bound_of_float64(twin: Ops, vocab_size: int, scale: float):
    logits = np.random.default_rng(1).standard_normal((4, vocab_size)) * scale
    logits = logits.astype(np.float32)
    count = min(20, vocab_size)

    result = score(twin, logits, count)

    expected = np.sort(truth(logits), axis=-1)[:, ::-1][:, :count]
    bound = budget(logits, expected)
    assert (np.abs(result.top_logprobs - expected) <= bound).all()
    assert (result.token_logprobs == result.top_logprobs[:, 0]).all()  # the arg-max
    assert bound.max() < 4e-6  # the bound is not an empty one


def test_the_bound_would_notice_an_error_of_its_size(twin: Ops):
    logits = np.random.default_rng(1).standard_normal((4, 1000)).astype(np.float32)
    expected = np.sort(truth(logits), axis=-1)[:, ::-1][:, :5]

    shifted = score(twin, logits, 5).top_logprobs + np.float32(4e-6)

    assert (np.abs(shifted - expected) > budget(logits, expected)).any()


@given(st.lists(VALUE, min_size=1, max_size=12).filter(lambda v: max(v) > -math.inf), st.data())
def test_ranks_and_alternatives_are_those_of_a_stable_sort(
    twin: Ops, row: list, data: st.DataObject
):
    logits = np.array([row], np.float32)
    scored = data.draw(st.integers(-1, len(row) - 1))
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    token = order[0] if scored < 0 else scored

    result = score(twin, logits, 20, scored)

    assert result.token_ranks.tolist() == [order.index(token) + 1]
    assert result.top_ids[0].tolist() == order + [-1] * (20 - len(row))
    assert result.top_logprobs[0, order.index(token)] == result.token_logprobs[0] or math.isnan(
        result.token_logprobs[0]
    )
    assert np.isnan(result.top_logprobs[0, len(row) :]).all()


def test_a_token_that_cannot_be_has_minus_infinity(twin: Ops):
    result = score(twin, np.array([[0, -math.inf, 1]], np.float32), 3, scored_id=1)

    assert result.token_logprobs.tolist() == [-math.inf]
    assert result.token_ranks.tolist() == [3]


@pytest.mark.parametrize("row", [[math.nan, 1], [math.inf, 1], [-math.inf, -math.inf]])
def test_a_row_that_is_not_finite_has_no_logprobs(twin: Ops, row: list[float]):
    result = score(twin, np.array([row], np.float32), 1)

    assert np.isnan(result.token_logprobs).all() and np.isnan(result.top_logprobs).all()
    assert result.top_ids.tolist() == [[0]] and result.token_ranks.tolist() == [1]


def test_only_rows_that_ask_are_scored_and_only_as_far_as_they_ask(twin: Ops):
    logits = np.random.default_rng(2).standard_normal((4, 9)).astype(np.float32)
    rows = page.rows(4, temperature=0, num_logprobs=[-1, 0, 2, 3])

    _, result = twin.sample(logits, page.sampling(rows, max_logprobs=3))

    assert result is not None
    assert np.isnan(result.token_logprobs).tolist() == [True, False, False, False]
    assert (result.top_ids >= 0).sum(-1).tolist() == [0, 0, 2, 3]
    assert (~np.isnan(result.top_logprobs)).sum(-1).tolist() == [0, 0, 2, 3]


def test_scores_are_those_of_the_logits_before_any_edit(twin: Ops):
    logits = np.array([[5.0, 1.0, 0.0, -1.0]], np.float32)
    edits = np.array([(0, 0, 0.0, EDIT_BANNED), (2, 0, 50.0, 0)], EDIT)
    rows = page.rows(1, temperature=0.5, num_logprobs=4, num_edits=2)

    ids, result = twin.sample(logits, page.sampling(rows, edits, max_logprobs=4))

    assert result is not None
    assert ids.tolist() == [2]  # the bias chose it
    assert result.token_ranks.tolist() == [3]
    assert result.top_ids.tolist() == [[0, 1, 2, 3]]
    assert np.abs(result.top_logprobs - truth(logits)).max() < 1e-6
    assert result.token_logprobs[0] == result.top_logprobs[0, 2]


def test_temperature_does_not_enter_the_scores(twin: Ops):
    logits = np.random.default_rng(3).standard_normal((2, 50)).astype(np.float32)
    logits[1] = logits[0]
    rows = page.rows(2, temperature=[1, 0.1], num_logprobs=5, scored_id=7)

    _, result = twin.sample(logits, page.sampling(rows, max_logprobs=5))

    assert result is not None
    assert result.token_logprobs[0] == result.token_logprobs[1]
    assert result.top_logprobs[0].tolist() == result.top_logprobs[1].tolist()
