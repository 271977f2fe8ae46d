"""Drawing a token: exact inverse-CDF arithmetic at every u, the filters, the random numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from engine.ops import Ops
from tests.twin import sampling_contract as page

INF, NAN = math.inf, math.nan
# Few values, so that ties are common; at temperature 1 a weight of 38 bits cannot hold exp(-100).
LOGIT = st.sampled_from(
    [-INF, -100.0, -3.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.25, 2.0, 7.0]
) | st.floats(-30, 30, width=32)
FINITE_ROW = st.lists(LOGIT, min_size=1, max_size=9).filter(lambda row: max(row) > -INF)
FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-5, 0.25, 1.0, 1.7, 100.0]),
        "top_k": st.sampled_from([0, 1, 2, 3, 8, 9, 2**31 - 1]),
        "top_p": st.sampled_from([1e-6, 0.25, 0.5, 0.75, 0.9, 1.0])
        | st.floats(2.0**-16, 1, width=32),
        "min_p": st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(0, 1, width=32),
    }
)


def floats(*values: object) -> np.ndarray:
    return np.array(values, np.float32)


def draw(ops: Ops, row: np.ndarray, uniforms: list[int], **fields: float) -> list[int]:
    """The tokens that one row of logits gives at each of these u."""
    logits = np.repeat(row[None], len(uniforms), axis=0)
    batch = page.sampling(page.rows(len(uniforms), **fields))
    return ops.sample(logits, batch, np.array(uniforms, np.uint64))[0].tolist()


@settings(max_examples=300)
@given(FINITE_ROW, FILTERS)
def test_the_token_is_the_exact_inverse_cdf_at_every_u(twin: Ops, row: list[float], filters: dict):
    logits = floats(*row)
    temperature = filters["temperature"]
    masses = page.kept_masses(
        logits, temperature, top_k=filters["top_k"], top_p=filters["top_p"], min_p=filters["min_p"]
    )  # fmt: skip
    uniforms = page.borders(masses)  # u enters through these borders alone

    tokens = draw(twin, logits, uniforms, **filters)

    assert tokens == [page.drawn(masses, u) for u in uniforms]
    assert set(tokens) == {i for i, mass in enumerate(masses) if mass}


@pytest.mark.parametrize("bits", range(1, 9))
def test_equal_logits_share_the_range_of_u_in_the_order_of_ids(twin: Ops, bits: int):
    # 2^bits tokens of weight 2^38: the token is the highest bits of u, here for every leading byte
    uniforms = [(byte << 56) + low for byte in range(256) for low in (0, 2**56 - 1)]

    tokens = draw(twin, np.zeros(1 << bits, np.float32), uniforms)

    assert tokens == [u >> (64 - bits) for u in uniforms]


@pytest.mark.parametrize("vocab_size", [1, 31, 1000, 128256])
def test_rows_of_a_real_size_follow_the_page(twin: Ops, vocab_size: int):
    rng = np.random.default_rng(vocab_size)
    logits = (rng.standard_normal(vocab_size) * 3).astype(np.float32)
    uniforms = [int(u) for u in rng.integers(0, 2**64, 3, np.uint64)]
    order = np.argsort(-logits, kind="stable")
    masses = page.weights(logits, 0.8)
    for top_k, top_p in ((0, 1.0), (50, 1.0), (0, 0.9), (200, 0.5)):
        left = order[: top_k or vocab_size]
        numerator = int(float(np.float32(top_p)) * 2**64)
        total, above, keep = sum(masses[i] for i in left), 0, set()
        for i in left:  # no ties among these
            if (above << 64) >= numerator * total:
                break
            keep.add(int(i))
            above += masses[i]
        expected = [page.drawn([m if i in keep else 0 for i, m in enumerate(masses)], u)
                    for u in uniforms]  # fmt: skip

        assert draw(twin, logits, uniforms, temperature=0.8, top_k=top_k, top_p=top_p) == expected


class TestTies:
    # u sweeps the range: what is drawn at some u is what was kept
    SWEEP = [i << 58 for i in range(64)]

    def kept(self, ops: Ops, row: np.ndarray, **fields: float) -> set[int]:
        return set(draw(ops, row, self.SWEEP, **fields))

    def test_all_that_equal_the_last_of_top_k_stay(self, twin: Ops):
        assert self.kept(twin, floats(1, 2, 1, 2, 1, 0), top_k=3) == {0, 1, 2, 3, 4}

    @pytest.mark.parametrize("ulps", [0, 1])
    @pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.25}])
    def test_one_float_below_the_last_is_not_equal(self, twin: Ops, ulps: int, filters: dict):
        last = np.float32(1) + ulps * np.spacing(np.float32(1))  # its bits even, then odd

        assert self.kept(twin, floats(last, np.nextafter(last, np.float32(0))), **filters) == {0}

    def test_all_that_equal_the_last_of_top_p_stay(self, twin: Ops):
        # four of a quarter each: none of them stands above another
        assert self.kept(twin, floats(1, 1, 1, 1), top_p=1e-6) == {0, 1, 2, 3}

    def test_mass_that_reaches_top_p_exactly_is_enough(self, twin: Ops):
        row = page.BORDERS_OF_TOP_P[0]  # a half and two quarters

        assert self.kept(twin, row, temperature=page.EXACT, top_p=0.5) == {0}
        assert self.kept(twin, row, temperature=page.EXACT, top_p=0.5000001) == {0, 1, 2}

    def test_mass_that_is_half_a_unit_short_of_top_p_is_not(self, twin: Ops):
        row = page.BORDERS_OF_TOP_P[1]
        masses = page.weights(row, page.EXACT)
        assert 4 * masses[0] == 3 * sum(masses) - 2

        assert 1 in draw(twin, row, page.borders(masses), temperature=page.EXACT, top_p=0.75)

    def test_the_zeros_are_equal(self, twin: Ops):
        assert self.kept(twin, floats(0.0, -0.0, -1), top_k=1) == {0, 1}

    def test_min_p_keeps_what_equals_it(self, twin: Ops):
        assert self.kept(twin, floats(0, 0, -1), min_p=1.0) == {0, 1}


def test_a_row_without_a_temperature_keeps_its_arg_max(twin: Ops):
    logits = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    batch = page.sampling(page.rows(4, temperature=[0, 1, 0, 1], top_k=0))

    ids = twin.sample(logits, batch, np.array([2**63] * 4, np.uint64))[0]

    assert ids[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    assert ids[[1, 3]].tolist() != logits.argmax(-1)[[1, 3]].tolist()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, NAN, 3], 1),
        ([1, INF, 3, INF], 1),
        ([-INF, -INF], 0),
        ([NAN, NAN], 0),
        ([-INF, 2, -INF], 1),
        ([3e38, -3e38], 0),  # their difference is -inf
    ],
)
def test_a_row_that_is_not_finite_gives_its_arg_max(twin: Ops, row: list[float], expected: int):
    for u in (0, 2**63, page.U_MAX):
        assert draw(twin, floats(*row), [u]) == [expected]


def test_what_has_less_than_the_smallest_weight_is_never_drawn(twin: Ops):
    # exp2(-39) is half a unit; exp2(-38) is one
    row = floats(0, -39 * math.log(2), -38 * math.log(2))
    uniforms = [0, page.U_MAX, *(2**63 + i for i in range(5))]

    assert 1 not in draw(twin, row, uniforms)
    assert draw(twin, row, [page.U_MAX]) == [2]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_frequencies_are_those_of_the_softmax(twin: Ops):
    # 15 degrees of freedom: one seed in 10,000 lies beyond 44.3
    row, count = (np.arange(16) / 5).astype(np.float32), 20_000
    batch = page.sampling(page.rows(count, seed=1234, position=np.arange(count), temperature=0.7))

    ids = twin.sample(np.repeat(row[None], count, axis=0), batch)[0]

    p = np.exp(row.astype(np.float64) / np.float64(np.float32(0.7)))
    counts = np.bincount(ids, minlength=16)
    assert chi_square(counts, count * p / p.sum()) < 44.3
    assert chi_square(counts, np.full(16, count / 16)) > 1000  # the measure tells a wrong one


@pytest.mark.parametrize("neighbour", ["position", "seed", "choice"])
def test_neighbouring_draws_are_independent(twin: Ops, neighbour: str):
    # pairs of neighbours over 4 x 4 cells, 15 degrees of freedom
    count = 20_000
    fields = {"seed": 5, "position": 9, "choice": 2} | {neighbour: np.arange(count)}

    ids = twin.sample(np.zeros((count, 4), np.float32), page.sampling(page.rows(count, **fields)))[
        0
    ]

    pairs = np.bincount(4 * ids[:-1] + ids[1:], minlength=16)
    assert chi_square(pairs, np.full(16, (count - 1) / 16)) < 44.3


class TestUniform:
    # the known answers are those of Random123's kat_vectors
    def test_the_known_answer_that_the_engine_can_be_asked_for(self, twin: Ops):
        assert uniforms(twin, [0], [0], [0]) == [0xE169C58D_6627E8D5]

    @given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1),
                              st.integers(0, 2**31 - 1)), min_size=1, max_size=20))  # fmt: skip
    def test_any_seed_position_and_choice(self, twin: Ops, keys: list[tuple[int, int, int]]):
        assert uniforms(twin, *map(list, zip(*keys, strict=True))) == [
            page.philox(*k) for k in keys
        ]

    def test_the_reference_has_those_of_whole_counters(self):
        # its rounds with all four words of the counter, which the engine leaves at zero
        for counter, key, expected in (
            ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
            (
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                [0xA4093822, 0x299F31D0],
                [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
            ),
        ):
            assert page.philox_rounds(counter, key) == expected

    def test_the_rows_own_draws_are_these(self, twin: Ops):
        rng = np.random.default_rng(1)
        logits = rng.standard_normal((30, 40)).astype(np.float32)
        batch = page.sampling(
            page.rows(30, seed=rng.integers(0, 2**64, 30, np.uint64), position=np.arange(30),
                      choice=np.arange(30) % 3)
        )  # fmt: skip
        given_u = np.array(
            [page.philox(*map(int, (r["seed"], r["position"], r["choice"]))) for r in batch.rows],
            np.uint64,
        )

        assert (
            twin.sample(logits, batch)[0].tolist()
            == twin.sample(logits, batch, given_u)[0].tolist()
        )


@pytest.mark.parametrize(("part", "bits"), [("seed", 64), ("position", 31), ("choice", 31)])
def test_every_bit_of_seed_position_and_choice_changes_the_draw(twin: Ops, part: str, bits: int):
    # two draws of 64 bits that are independent are equal once in 2^64
    at = ("seed", "position", "choice").index(part)
    keys = np.array([[0x9E3779B97F4A7C15, 12345, 7]] * (bits + 1), np.uint64)
    keys[1:, at] ^= np.uint64(1) << np.arange(bits, dtype=np.uint64)

    draws = uniforms(twin, *keys.T.tolist())

    assert len(set(draws)) == bits + 1


def uniforms(ops: Ops, seeds: list, positions: list, choices: list) -> list[int]:
    arrays = (
        np.array(seeds, np.uint64),
        np.array(positions, np.int32),
        np.array(choices, np.int32),
    )
    return [int(u) for u in ops.uniform(*arrays)]


@settings(max_examples=30)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_a_row_gives_its_token_in_any_batch_and_at_any_place(
    twin: Ops, order: list[int], count: int
):
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((12, 33)).astype(np.float32)
    all_rows = page.rows(
        12, seed=np.arange(12) % 4, position=np.arange(12), temperature=[0, 0.5, 1] * 4,
        top_k=[0, 5, 9, 0] * 3, top_p=[1, 0.5] * 6, min_p=[0, 0, 0.1] * 4,
    )  # fmt: skip
    alone = [
        twin.sample(logits[i : i + 1], page.sampling(all_rows[i : i + 1]))[0][0] for i in range(12)
    ]
    some = order[:count]

    ids = twin.sample(logits[some], page.sampling(all_rows[some]))[0]

    assert ids.tolist() == [alone[i] for i in some]


@settings(max_examples=20)
@given(st.permutations(range(8)), st.integers(2, 8))
def test_a_row_gets_its_scores_and_edits_in_any_batch_and_at_any_place(
    twin: Ops, order: list[int], count: int
):
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((8, 33)).astype(np.float32)
    all_rows = page.rows(
        8, seed=np.arange(8), num_logprobs=[0, 5, -1, 3] * 2, scored_id=[-1, 4, -1, 9] * 2,
        frequency_penalty=np.arange(8) / 9, num_edits=3,
    )  # fmt: skip
    edits = np.zeros(24, page.EDIT)
    edits["token_id"], edits["bias"] = np.tile([4, 9, 20], 8), 3 * rng.standard_normal(24)
    edits["count"] = np.arange(24) % 5

    def scored(some: list[int]) -> list[tuple[object, ...]]:
        mine = np.concatenate([edits[3 * i : 3 * i + 3] for i in some])
        batch = page.sampling(all_rows[some], mine, max_logprobs=5)
        ids, scores = twin.sample(logits[some], batch)
        unscored = all_rows[some]
        unscored["num_logprobs"] = -1
        edited = twin.edit_logits(logits[some], page.sampling(unscored, mine))
        fields = [ids, edited, *vars(scores).values()]
        return [tuple(field[i].tobytes() for field in fields) for i in range(len(some))]

    some = order[:count]
    assert scored(some) == [scored([i])[0] for i in some]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_change_nothing(library, twin: Ops, num_threads: int):
    logits = np.random.default_rng(4).standard_normal((17, 500)).astype(np.float32)
    batch = page.sampling(page.rows(17, seed=np.arange(17), top_p=0.8))

    with Ops(library, "cpu", num_threads) as ops:
        assert ops.sample(logits, batch)[0].tolist() == twin.sample(logits, batch)[0].tolist()


@pytest.mark.parametrize(
    ("changed", "unchanged"),
    [
        ({"temperature": 0.2}, {"temperature": 1.0}),
        ({"top_k": 2}, {"top_k": 0}),
        ({"top_p": 0.3}, {"top_p": 1.0}),
        ({"min_p": 0.5}, {"min_p": 0.0}),
        ({"seed": 1}, {"seed": 0}),
        ({"position": 1}, {"position": 0}),
        ({"choice": 1}, {"choice": 0}),
    ],
)
def test_each_parameter_changes_what_is_drawn(twin: Ops, changed: dict, unchanged: dict):
    logits = np.random.default_rng(5).standard_normal((64, 40)).astype(np.float32)
    fields = {"seed": np.arange(0, 640, 10), "position": np.arange(64)}

    def tokens(change: dict) -> list[int]:
        shifted = {
            name: fields[name] + value if name in fields else value
            for name, value in change.items()
        }
        return twin.sample(logits, page.sampling(page.rows(64, **(fields | shifted))))[0].tolist()

    assert tokens(unchanged) == tokens({})
    assert tokens(changed) != tokens({})


def test_sampling_rows_of_another_number_are_refused(twin: Ops):
    with pytest.raises(InvalidArgument, match=r"sampling.rows has shape \(2,\), must be \(3,\)"):
        twin.sample(np.zeros((3, 4), np.float32), page.sampling(page.rows(2)))
