"""The filters keep the tokens that transformers' logits processors keep, and with their shares.

What the engine keeps is found from outside: the drawn token only grows with u, so halving the range
of u between two different tokens finds every token that can be drawn, and the borders between them.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.ops import Ops
from tests.twin import sampling_contract as page

VOCAB = 40
# Distinct, as transformers cuts ties of top_p in the order of a sort; and within 16 of each other
# over the temperature, so that no weight is under its unit of 2^-38.
LOGITS = st.lists(st.integers(-4000, 4000), min_size=VOCAB, max_size=VOCAB, unique=True).map(
    lambda values: np.array(values, np.float32) / np.float32(1000)
)


def shares(ops: Ops, logits: np.ndarray, **fields: float) -> dict[int, float]:
    """Every token that can be drawn, and its share of the range of u."""

    def draw(uniforms: list[int]) -> list[int]:
        rows = page.sampling(page.rows(len(uniforms), **fields))
        repeated = np.repeat(logits[None], len(uniforms), axis=0)
        return ops.sample(repeated, rows, np.array(uniforms, np.uint64))[0].tolist()

    low, high = draw([0, page.U_MAX])
    open_ranges, borders = [(0, low, page.U_MAX, high)], {}
    while open_ranges := [r for r in open_ranges if r[1] != r[3]]:
        middles = [(a + b) // 2 for a, _, b, _ in open_ranges]
        found = draw(middles)
        halves = []
        for (a, first, b, last), middle, token in zip(open_ranges, middles, found, strict=True):
            if b - a == 1:
                borders[last] = b  # the least u that gives `last`
            else:
                halves += [(a, first, middle, token), (middle, token, b, last)]
        open_ranges = halves
    starts = [(0, low), *sorted((u, token) for token, u in borders.items())]
    ends = [u for u, _ in starts[1:]] + [2**64]
    return {token: (end - u) / 2**64 for (u, token), end in zip(starts, ends, strict=True)}


def processed(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float):
    """transformers' own probabilities, in the order in which generate() runs its processors."""
    processors = LogitsProcessorList()
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        processors.append(MinPLogitsWarper(min_p))
    scores = processors(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits[None]))
    return torch.softmax(scores[0].double(), -1).numpy()


def is_near_a_border(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
):
    """Whether the rounding of transformers' float32 may decide: then no answer is the right one."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    left = np.sort(p)[::-1][: top_k or len(p)]
    above = np.concatenate([[0], np.cumsum(left)])[:-1] / left.sum()
    near_top_p = top_p < 1 and np.abs(above - top_p).min() < 1e-5
    near_min_p = min_p > 0 and np.abs(p - min_p).min() < 1e-5
    return near_top_p or near_min_p


@settings(max_examples=150)
@given(
    LOGITS,
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0, 1, 5, VOCAB - 1, VOCAB]),
    st.sampled_from([1.0, 0.95, 0.6, 0.1]),
    st.sampled_from([0.0, 0.02, 0.3]),
)
def test_the_kept_tokens_and_their_shares(
    twin: Ops, logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
):
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    assume(not is_near_a_border(logits, **filters))

    ours = shares(twin, logits, **filters)
    theirs = processed(logits, **filters)

    assert sorted(ours) == np.flatnonzero(theirs).tolist()
    assert max(abs(share - theirs[token]) for token, share in ours.items()) < 1e-6


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_top_k_keeps_the_ties_that_transformers_keeps(twin: Ops, top_k: int):
    logits = np.array([1, 2, 0, 2, 1, 1, -1], np.float32)

    ours = shares(twin, logits, top_k=top_k)

    assert sorted(ours) == np.flatnonzero(processed(logits, 1, top_k, 1, 0)).tolist()


def test_every_filter_alone_drops_something_here(twin: Ops):
    # the property above would pass empty-handed if nothing were ever dropped
    logits = np.linspace(-4, 4, VOCAB).astype(np.float32)

    for filters in ({"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.02}):
        assert len(shares(twin, logits, **filters)) < VOCAB
    assert len(shares(twin, logits)) == VOCAB
