"""Every draw, uniform, edit and score is what the page says.

Small rows at every border; verification/mutants/sampling.toml has the faults that must fail here.
"""

import numpy as np
import pytest

from engine.ops import Ops
from engine.sampling import EDIT
from tests.twin import sampling_contract as page

SETTINGS = [
    (t, k, p, m)
    for t in (0.5, 1.0)
    for k in (0, 1, 3, 8)
    for p in (1.0, 0.7, 0.5)
    for m in (0.0, 0.3, 1.0)
] + [(page.EXACT, 0, 0.5, 0.0), (page.EXACT, 0, 0.75, 0.0)]
LOGITS = {
    "the first border of top_p": page.BORDERS_OF_TOP_P[0],
    "the second border of top_p": page.BORDERS_OF_TOP_P[1],
    "exact shares": np.array([0, 0, -0.0, 0.0], np.float32),  # top_p of a half
    "both zeros": np.array([2, -0.0, 0.0, 0, -1, -3, -2, 1.5], np.float32),
    "random": np.random.default_rng(0).standard_normal(8).astype(np.float32),
    "ties and a far token": np.array([3, 3, 1, 1, 1, -5, -6, -40], np.float32),
}


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_every_border_of_every_filter_gives_the_pages_token(twin: Ops, logits: np.ndarray):
    fields, uniforms, expected = [], [], []
    for temperature, top_k, top_p, min_p in SETTINGS:
        masses = page.kept_masses(logits, temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for u in page.borders(masses):
            fields.append((temperature, top_k, top_p, min_p))
            uniforms.append(u)
            expected.append(page.drawn(masses, u))
    names = ("temperature", "top_k", "top_p", "min_p")
    columns = dict(zip(names, zip(*fields, strict=True), strict=True))
    batch = page.sampling(page.rows(len(fields), **columns))

    drawn, _ = twin.sample(np.tile(logits, (len(fields), 1)), batch, np.array(uniforms, np.uint64))

    assert drawn.tolist() == expected


def test_a_row_without_a_temperature_is_not_drawn(twin: Ops):
    greedy = page.sampling(page.rows(1, temperature=0))
    row = np.array([[1.0, 0.99]], np.float32)

    ids, _ = twin.sample(row, greedy, np.array([page.U_MAX], np.uint64))

    assert ids.tolist() == [0]


def test_uniforms_are_the_pages(twin: Ops):
    seeds = np.array([0, 1, 2**40 + 3, 2**64 - 1], np.uint64)
    positions, choices = np.array([0, 7, 1000, 2**31 - 1], np.int32), np.arange(4, dtype=np.int32)
    keys = zip(seeds.tolist(), positions.tolist(), choices.tolist(), strict=True)

    found = twin.uniform(seeds, positions, choices)

    assert found.tolist() == [page.philox(*key) for key in keys]


def test_edited_logits_are_the_pages(twin: Ops):
    rows = page.rows(
        2, repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=0.6, num_edits=6
    )
    one_row = [(0, 3, 0.5, 1), (1, 0, 0.0, 1), (2, 2, -4.0, 1), (3, 0, 2.0, 0), (4, 0, 0, 2),
               (5, 1, 0.0, 1)]  # fmt: skip
    edits = np.array([*one_row, *((i + 1, *rest) for i, *rest in one_row)], EDIT)
    logits = np.array([[1, -1, 2, 0.5, 9, -3, 4], [2, 1, -1, 3, 0.25, -7, 5]], np.float32)
    expected = [page.edited(logits[i], rows[i], edits[6 * i : 6 * i + 6]) for i in range(2)]

    edited = twin.edit_logits(logits, page.sampling(rows, edits))

    assert edited.tobytes() == np.array(expected).tobytes()


def test_scores_are_those_of_the_logits_without_their_edits(twin: Ops):
    logits = np.array([[1, 3, 3, -2], [0.5, 0.25, -1, 4]], np.float32)
    edits = np.array([(1, 0, 0, 2), (3, 0, 0, 2), (0, 0, 9.0, 0)], EDIT)
    rows = page.rows(2, temperature=[0.5, 0], num_logprobs=4, scored_id=[-1, 2], num_edits=[1, 2])

    ids, found = twin.sample(logits, page.sampling(rows, edits, 4), np.zeros(2, np.uint64))

    truth = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    order = [sorted(range(4), key=lambda i, row=row: (-row[i], i)) for row in logits.tolist()]
    scored = [int(ids[0]), 2]
    assert ids.tolist() == [0, 0]
    assert found.token_ranks.tolist() == [order[i].index(scored[i]) + 1 for i in range(2)]
    assert found.top_ids.tolist() == order
    # One rounding to float32 of a value below 32 is 2^-20 at most; four of them.
    near = {"rtol": 0, "atol": 4e-6}
    listed = np.take_along_axis(truth, np.array(order), axis=1)
    np.testing.assert_allclose(found.top_logprobs, listed, **near)
    np.testing.assert_allclose(found.token_logprobs, truth[[0, 1], scored], **near)
