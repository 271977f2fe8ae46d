"""Sampling: the GPU's edits, tokens and scores are the twin's, to the bit."""

import numpy as np
import pytest

from engine.ops import Ops
from engine.sampling import EDIT, Logprobs, SamplingBatch
from tests.kernels.inputs import assert_same_bits
from tests.twin import sampling_contract as page

pytestmark = pytest.mark.gpu

VOCAB_SIZES = (1, 2, 31, 32, 33, 320, 1023, 1024, 1025, 2049, 5000, 49_152, 128_256)
FILTERS = {
    "none": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 200, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
    "one": {"top_k": 1},
    "least": {"top_p": 1e-6},
    "hot": {"temperature": 100, "top_p": 0.999},
    "cold": {"temperature": 1e-5},
}


def normal_rows(count: int, vocab_size: int, scale: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng([count, vocab_size])
    return (rng.standard_normal((count, vocab_size)) * scale).astype(np.float32)


def assert_equal(gpu: Ops, twin: Ops, logits: np.ndarray, batch: SamplingBatch) -> None:
    ids, scores = gpu.sample(logits, batch)
    twin_ids, twin_scores = twin.sample(logits, batch)

    assert_same_bits(ids, twin_ids)
    assert (scores is None) == (twin_scores is None)
    for name in Logprobs.__dataclass_fields__ if scores is not None else ():
        assert_same_bits(getattr(scores, name), getattr(twin_scores, name), any_nan=True)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_every_filter_over_every_size(gpu: Ops, twin: Ops, vocab_size: int, filters: dict):
    batch = page.sampling(page.rows(5, seed=np.arange(5), position=vocab_size, **filters))

    assert_equal(gpu, twin, normal_rows(5, vocab_size), batch)


# clusters of 8, 4, 2 blocks and one, at both ends
@pytest.mark.parametrize("count", [1, 16, 17, 33, 34, 66, 67, 132, 133, 256])
def test_every_row_of_a_mixed_batch(gpu: Ops, twin: Ops, count: int):
    rng = np.random.default_rng(count)
    rows = page.rows(
        count,
        seed=rng.integers(0, 2**64, count, np.uint64),
        position=rng.integers(0, 2**31 - 1, count),
        choice=rng.integers(0, 128, count),
        temperature=rng.choice([0, 0.3, 1, 2], count),
        top_k=rng.choice([0, 1, 7, 100, 5000], count),
        top_p=rng.choice([1e-6, 0.5, 0.95, 1], count),
        min_p=rng.choice([0, 0.02, 1], count),
        num_logprobs=rng.choice([-1, 0, 1, 20], count),
        scored_id=rng.choice([-1, 3, 4999], count),
    )

    assert_equal(gpu, twin, normal_rows(count, 5000), page.sampling(rows, max_logprobs=20))


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_rows_full_of_ties(gpu: Ops, twin: Ops, filters: dict):
    # every bin of a histogram holds thousands: the carries between its words are many
    logits = np.random.default_rng(1).integers(-2, 3, (6, 50_000)).astype(np.float32)
    logits[3] = 0
    logits[4, ::2] = -0.0
    batch = page.sampling(page.rows(6, seed=np.arange(6), num_logprobs=20, **filters), None, 20)

    assert_equal(gpu, twin, logits, batch)


def test_every_border_of_u(gpu: Ops):
    logits = np.array([1, -2, 0.5, 0.5, -40, 3, -0.25], np.float32)
    masses = page.kept_masses(logits, 0.9, top_k=6, top_p=0.97)
    uniforms = page.borders(masses)
    rows = page.rows(len(uniforms), temperature=0.9, top_k=6, top_p=0.97)
    repeated = np.repeat(logits[None], len(uniforms), axis=0)

    ids, _ = gpu.sample(repeated, page.sampling(rows), np.array(uniforms, np.uint64))

    assert ids.tolist() == [page.drawn(masses, u) for u in uniforms]


def test_random_u_over_a_whole_vocabulary(gpu: Ops, twin: Ops):
    logits = np.repeat(normal_rows(1, 128_256), 24, axis=0)
    uniforms = np.random.default_rng(9).integers(0, 2**64, 24, np.uint64)
    uniforms[:3] = 0, 2**64 - 1, 2**63
    batch = page.sampling(page.rows(24, temperature=1.3))

    assert_same_bits(
        gpu.sample(logits, batch, uniforms)[0], twin.sample(logits, batch, uniforms)[0]
    )


def test_rows_that_are_not_finite_and_their_neighbours(gpu: Ops, twin: Ops):
    logits = normal_rows(9, 3000)
    logits[0] = -np.inf
    logits[2, 100:200] = np.nan
    logits[4, 2999] = np.inf
    logits[6, 1:] = -np.inf
    logits[8, ::3] = -np.inf
    rows = page.rows(9, seed=7, top_k=40, top_p=0.9, num_logprobs=3)

    assert_equal(gpu, twin, logits, page.sampling(rows, max_logprobs=3))
    clean = slice(1, 9, 2)
    alone = gpu.sample(logits[clean].copy(), page.sampling(rows[clean].copy(), None, 3))[0]
    assert_same_bits(gpu.sample(logits, page.sampling(rows, max_logprobs=3))[0][clean], alone)


def random_edits(count: int, vocab_size: int, per_row: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(per_row)
    rows = page.rows(
        count,
        seed=np.arange(count),
        repetition_penalty=rng.choice([1, 0.01, 1.3, 100], count),
        presence_penalty=rng.choice([0, -2, 0.3], count),
        frequency_penalty=rng.choice([0, 2, 0.1], count),
        num_edits=per_row,
        num_logprobs=5,
    )
    edits = np.zeros(count * per_row, EDIT)
    edits["token_id"] = np.concatenate(
        [rng.permutation(vocab_size)[:per_row] for _ in range(count)]
    )
    edits["count"] = rng.integers(0, 50, len(edits))
    edits["bias"] = rng.uniform(-100, 100, len(edits)).astype(np.float32)
    edits["flags"] = rng.integers(0, 4, len(edits))
    return rows, edits


@pytest.mark.parametrize(
    ("count", "vocab_size", "per_row"),
    [(1, 7, 7), (3, 5000, 1), (2, 128_256, 128_255), (256, 320, 320)],
)
def test_edits_and_what_follows_from_them(
    gpu: Ops, twin: Ops, count: int, vocab_size: int, per_row: int
):
    logits = normal_rows(count, vocab_size)
    rows, edits = random_edits(count, vocab_size, per_row)
    batch = page.sampling(rows, edits, max_logprobs=5)

    assert_equal(gpu, twin, logits, batch)
    rows["num_logprobs"] = -1
    assert_same_bits(gpu.edit_logits(logits, batch), twin.edit_logits(logits, batch))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_scores_of_every_size(gpu: Ops, twin: Ops, vocab_size: int):
    rows = page.rows(3, temperature=[0, 1, 1], num_logprobs=[20, 0, 5], scored_id=[-1, 0, -1])

    assert_equal(gpu, twin, normal_rows(3, vocab_size), page.sampling(rows, max_logprobs=20))
