"""The k16 step: against the page in rational numbers, and against what a GPU computed.

Three routes must agree to the bit: the specification (op_tensor_core_step), the vectors that linear
layers use, and the reference of this folder.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits, normal, wide
from tests.twin.step_inputs import ACCUMULATOR, OPERANDS

RECORDED = Path(__file__).resolve().parents[2] / "golden" / "hardware"


def as_float(bits: list[int] | np.ndarray) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


def adversarial(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n steps, finite: a regime per step, one seventh of them each."""
    rng = np.random.default_rng(seed)
    regime = rng.integers(0, 7, n)[:, None]

    def draw(is_b: bool) -> np.ndarray:
        sign = rng.integers(0, 2, (n, 16))
        low = np.where(rng.random((n, 16)) < 0.3, 127, rng.integers(0, 128, (n, 16)))
        spread = np.choose(
            regime,
            [
                rng.integers(125, 130, (n, 16)),
                rng.integers(117, 138, (n, 16)),
                rng.integers(0, 127 if is_b else 255, (n, 16)),
                rng.integers(0, 4, (n, 16)) + (200 if is_b else 0),  # denormals that count
                rng.integers(49, 67, (n, 16)),  # products near 2^-126
                np.broadcast_to(rng.integers(100, 150, (n, 1)), (n, 16)),  # equal exponents
                # zeros against anything, so that zero products meet huge and tiny operands
                np.where(rng.random((n, 16)) < 0.5, 0, rng.integers(0, 120, (n, 16)))
                if not is_b
                else rng.integers(0, 255, (n, 16)),
            ],
        )
        low = np.where((regime == 6) & (spread == 0), 0, low)
        low = np.where((regime == 5) & (rng.random((n, 1)) < 0.7), 127, low)
        sign = np.where((regime == 5) & (rng.random((n, 1)) < 0.7), 0, sign)
        return (sign << 15 | spread << 7 | low).astype(np.uint16)

    a, b = draw(False), draw(True)
    cancel = rng.random(n) < 0.2  # neighbours that annihilate, but for a last bit now and then
    a[cancel, 1::2] = a[cancel, ::2] ^ (rng.random((cancel.sum(), 8)) < 0.2)
    b[cancel, 1::2] = b[cancel, ::2] ^ 0x8000
    c_exponent = np.choose(
        regime[:, 0],
        [
            *[rng.integers(100, 150, n)] * 2,
            *[rng.integers(0, 255, n)] * 3,
            rng.integers(100, 175, n),
            rng.integers(0, 130, n),
        ],
    )
    c = as_float(rng.integers(0, 2, n) << 31 | c_exponent << 23 | rng.integers(0, 1 << 23, n))
    c[rng.random(n) < 0.2] = 0
    return c, a, b


@settings(max_examples=100)
@given(st.lists(st.tuples(ACCUMULATOR, OPERANDS, OPERANDS), min_size=1, max_size=8))
def test_the_step_is_the_pages_in_rational_numbers(twin: Ops, steps):
    c = as_float([c for c, _, _ in steps])
    a, b = (np.array([s[i] for s in steps], np.uint16) for i in (1, 2))
    expected = [contract.step_by_fractions(*one) for one in zip(c, a, b, strict=True)]

    assert_same_bits(twin.tensor_core_step(c, a, b), np.array(expected, np.float32))


@pytest.mark.parametrize("seed", range(4))
def test_the_step_is_the_pages_on_adversarial_data(twin: Ops, seed: int):
    c, a, b = adversarial(seed, 20_000)

    assert_same_bits(twin.tensor_core_step(c, a, b), contract.step(c, a, b))


@pytest.mark.parametrize("c_sign", [0, 1])
@pytest.mark.parametrize("exponent", [100, 127, 150])
def test_a_sum_past_2_to_the_31_units_is_exact(twin: Ops, exponent: int, c_sign: int):
    # 16 products of 1.9921875^2 are 63.50 * 2^25 units; an accumulator of the same e passes 2^31
    a = np.full((1, 16), exponent << 7 | 127, np.uint16)
    b = np.full((1, 16), 127 << 7 | 127 | c_sign << 15, np.uint16)
    for c_exponent in range(exponent - 2, exponent + 8):
        c = as_float([c_sign << 31 | c_exponent << 23 | 0x7FFFFF])
        assert_same_bits(twin.tensor_core_step(c, a, b), contract.step(c, a, b))


def test_the_order_of_the_sixteen_products_does_not_matter(twin: Ops):
    c, a, b = adversarial(11, 5_000)
    order = np.random.default_rng(0).permutation(16)
    shuffled = (np.ascontiguousarray(x[:, order]) for x in (a, b))

    assert_same_bits(twin.tensor_core_step(c, *shuffled), twin.tensor_core_step(c, a, b))


def test_the_operands_may_be_exchanged(twin: Ops):
    c, a, b = adversarial(12, 5_000)

    assert_same_bits(twin.tensor_core_step(c, b, a), twin.tensor_core_step(c, a, b))


@pytest.mark.parametrize("c", [0.0, -0.0])
@pytest.mark.parametrize("sign", [0, 0x8000])
def test_a_sum_of_zero_is_positive_zero(twin: Ops, c: float, sign: int):
    a = np.full((1, 16), sign, np.uint16)

    result = twin.tensor_core_step(
        np.array([c], np.float32), a, np.full((1, 16), 0x3F80, np.uint16)
    )

    assert_same_bits(result, np.zeros(1, np.float32))


@pytest.mark.parametrize("sign", [0, 0x8000])
def test_a_sum_too_small_for_a_denormal_is_cut_to_a_zero_of_its_sign(twin: Ops, sign: int):
    # one product of 2^-150 beside zeros: e is -126, the unit 2^-151, float32 ends at 2^-149
    a = np.zeros((1, 16), np.uint16)
    b = a.copy()
    a[0, 0], b[0, 0] = sign | (127 - 75) << 7, (127 - 75) << 7

    result = twin.tensor_core_step(np.zeros(1, np.float32), a, b)

    assert_same_bits(result, as_float([sign << 16]))


def not_finite(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps with infinities, NaN and zeros now and then, in a, b and c."""
    rng = np.random.default_rng(5)
    c, a, b = as_float(normal(0, n).astype(np.uint32) << 16), normal(1, n, 16), normal(2, n, 16)
    for x in (a, b):
        special = rng.random((n, 16)) < 0.02
        values = rng.choice(np.array([0x7F80, 0xFF80, 0x7FC0, 0x0000], np.uint16), (n, 16))
        x[special] = values[special]
    c[rng.random(n) < 0.03] = np.inf
    c[rng.random(n) < 0.03] = -np.inf
    c[rng.random(n) < 0.03] = np.nan
    return c, a, b


def test_infinities_and_nans_have_the_pages_bits(twin: Ops):
    c, a, b = not_finite(4_000)

    result = twin.tensor_core_step(c, a, b)

    assert np.isnan(result).sum() > 100 and np.isinf(result).sum() > 100
    assert (result[np.isnan(result)].view(np.uint32) == contract.F32_NAN).all()
    assert_same_bits(result, contract.step(c, a, b))


@pytest.mark.parametrize(
    ("c", "a", "b", "expected"),
    [
        (0.0, 0x7F80, 0x0000, contract.F32_NAN),  # inf * 0
        (0.0, 0x8000, 0xFF80, contract.F32_NAN),
        (0.0, 0x7F80, 0x3F80, 0x7F800000),
        (0.0, 0x7F80, 0xBF80, 0xFF800000),
        (np.inf, 0x7F80, 0xBF80, contract.F32_NAN),  # inf - inf
        (-np.inf, 0x7F80, 0xBF80, 0xFF800000),
        (-np.inf, 0x7F7F, 0x7F7F, 0xFF800000),  # a finite product over the range turns nothing
        (np.nan, 0x0000, 0x0000, contract.F32_NAN),
        (0.0, 0x7F7F, 0x7F7F, 0x7F800000),  # beyond the range
        (0.0, 0x7F7F, 0xFF7F, 0xFF800000),
    ],
)
def test_the_ends_of_the_range(twin: Ops, c: float, a: int, b: int, expected: int):
    operands = [np.zeros((1, 16), np.uint16) for _ in range(2)]
    operands[0][0, 9], operands[1][0, 9] = a, b

    result = twin.tensor_core_step(np.array([c], np.float32), *operands)

    assert_same_bits(result, as_float([expected]))


class TestTheVectorsOfLinearLayers:
    """op_linear_f32 with one step of K is op_tensor_core_step from zero."""

    @staticmethod
    def one_step_each(twin: Ops, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The diagonal of small products: every (a[i], b[i]) on the vector route."""
        rows = [
            np.diagonal(twin.linear_f32(a[i : i + 48], b[i : i + 48])) for i in range(0, len(a), 48)
        ]
        return np.concatenate(rows)

    @pytest.mark.parametrize("seed", range(3))
    def test_on_adversarial_data(self, twin: Ops, seed: int):
        _, a, b = adversarial(100 + seed, 4_800)
        zero = np.zeros(len(a), np.float32)

        assert_same_bits(self.one_step_each(twin, a, b), twin.tensor_core_step(zero, a, b))

    def test_on_infinities_and_nans(self, twin: Ops):
        c, a, b = not_finite(960)

        expected = twin.tensor_core_step(np.zeros_like(c), a, b)

        assert_same_bits(self.one_step_each(twin, a, b), expected)

    def test_every_pair_of_exponents(self, twin: Ops):
        fields = np.arange(0, 256, 3)
        a = np.zeros((len(fields), 16), np.uint16)
        a[:, 0] = fields << 7 | 0x55
        a[:, 1] = 0x3F80
        b = a.copy()
        b[:, 1] = 0xBF81
        pairs = [np.repeat(a, len(b), 0), np.tile(b, (len(a), 1))]
        zero = np.zeros(len(pairs[0]), np.float32)

        expected = twin.tensor_core_step(zero, *pairs).reshape(len(a), len(b))

        assert_same_bits(twin.linear_f32(a, b), expected)

    @pytest.mark.parametrize("seed", range(4))
    def test_a_chain_of_two_carries_every_accumulator(self, twin: Ops, seed: int):
        # the first step's result is the second's c: denormal, huge, cancelled or far away
        _, a_0, b_0 = adversarial(200 + seed, 2_400)
        _, a_1, b_1 = adversarial(300 + seed, 2_400)
        a, b = np.concatenate([a_0, a_1], 1), np.concatenate([b_0, b_1], 1)

        first = twin.tensor_core_step(np.zeros(len(a), np.float32), a_0, b_0)
        expected = twin.tensor_core_step(first, a_1, b_1)

        assert_same_bits(self.one_step_each(twin, a, b), expected)


@dataclass(frozen=True)
class Record:
    """One recorded problem: D = C0 + A Bᵀ in k16 steps, ascending."""

    k: int
    mode: int
    a: np.ndarray  # [M, K] bf16 bits
    b: np.ndarray  # [N, K] bf16 bits
    c: np.ndarray  # [M, N] float32
    d: np.ndarray  # [M, N] float32


def read_records(path: Path, has_accumulator: bool) -> Iterator[Record]:
    """Every record of a file, or ValueError if it does not end with one."""
    data = path.read_bytes()
    at = 0

    def take(count: int, dtype: str) -> np.ndarray:
        nonlocal at
        size = count * np.dtype(dtype).itemsize
        if count < 0 or at + size > len(data):
            raise ValueError(f"{path.name} breaks off at byte {at}")
        values = np.frombuffer(data, dtype, count, at)
        at += size
        return values

    while at < len(data):
        k, mode, m, n = (int(x) for x in take(4, "<i4"))
        if k < 16 or k % 16 or m < 1 or n < 1 or max(k, m, n) > 1 << 16:
            raise ValueError(f"{path.name}: no record header at byte {at - 16}")
        a, b = take(m * k, "<u2").reshape(m, k), take(n * k, "<u2").reshape(n, k)
        c = take(m * n, "<f4") if has_accumulator else np.zeros(m * n, np.float32)
        d = take(m * n, "<f4")
        yield Record(k, mode, a, b, c.reshape(m, n), d.reshape(m, n))


def records_of(path: Path) -> list[Record]:
    """Both formats: with the initial accumulators (mma_dump.cu), or from zero.

    The header of every record is checked, so a file reads as one of the two or as none.
    """
    for has_accumulator in (True, False):
        try:
            return list(read_records(path, has_accumulator))
        except ValueError as error:
            reason = error
    raise reason


def recorded_files() -> list[Path]:
    return sorted(RECORDED.glob("*.bin"))


def replay(twin: Ops, record: Record) -> np.ndarray:
    """The record's D as the twin computes it."""
    m, n = record.d.shape
    a = np.repeat(record.a, n, 0)
    b = np.tile(record.b, (m, 1))
    d = np.ascontiguousarray(record.c.reshape(-1))
    for k in range(0, record.k, 16):
        step = (np.ascontiguousarray(x[:, k : k + 16]) for x in (a, b))
        d = twin.tensor_core_step(d, *step)
    return d.reshape(m, n)


def test_hardware_results_are_recorded():
    assert recorded_files(), "golden/hardware/ has no recorded results: the step is unproved"


@pytest.mark.parametrize("path", recorded_files(), ids=lambda path: path.stem)
class TestTheRecordedHardware:
    def test_the_file_covers_single_steps_and_chains(self, path: Path):
        records = records_of(path)

        assert {record.k for record in records} >= {16, 32}
        assert len({record.mode for record in records}) >= 5

    def test_every_output_has_the_twins_bits(self, twin: Ops, path: Path):
        for record in records_of(path):
            assert_same_bits(replay(twin, record), record.d)

    def test_every_output_from_zero_has_the_bits_of_the_vectors(self, twin: Ops, path: Path):
        # +0 alone: a chain of a linear layer begins there
        from_zero = [r for r in records_of(path) if r.k <= 512 and not r.c.view(np.uint32).any()]
        for record in from_zero:
            a, b = np.ascontiguousarray(record.a), np.ascontiguousarray(record.b)
            assert_same_bits(twin.linear_f32(a, b), record.d)

    def test_every_output_has_the_bits_of_the_page(self, path: Path):
        for record in records_of(path):
            expected = contract.chain(record.c, record.a[:, None], record.b[None])
            assert_same_bits(record.d, expected)


def test_a_changed_bit_in_a_record_is_noticed(twin: Ops):
    a, b = wide(1, 4, 32), wide(2, 4, 32)
    record = Record(32, 0, a, b, np.zeros((4, 4), np.float32), twin.linear_f32(a, b))
    assert_same_bits(replay(twin, record), record.d)
    record.d.view(np.uint32)[2, 3] ^= 1

    with pytest.raises(AssertionError, match="1 of 16 differ"):
        assert_same_bits(replay(twin, record), record.d)


@pytest.mark.parametrize("has_accumulator", [True, False])
def test_a_record_file_is_read_back_and_a_broken_one_refused(tmp_path: Path, has_accumulator: bool):
    a, b = normal(1, 4, 16), normal(2, 8, 16)
    c, d = np.ones((4, 8), np.float32), np.full((4, 8), 2, np.float32)
    header = np.array([16, 3, 4, 8], "<i4").tobytes()
    data = header + a.tobytes() + b.tobytes() + (c.tobytes() if has_accumulator else b"")
    path = tmp_path / "records.bin"
    path.write_bytes((data + d.tobytes()) * 2)

    records = records_of(path)

    assert len(records) == 2 and records[1].mode == 3
    assert_same_bits(records[1].a, a)
    assert_same_bits(records[1].d, d)
    path.write_bytes((data + d.tobytes())[:-1])
    with pytest.raises(ValueError, match="breaks off|no record header"):
        records_of(path)
