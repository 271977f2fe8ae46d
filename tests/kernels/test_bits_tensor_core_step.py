"""The k16 step: the tensor cores' bits are the twin's, one step at a time."""

import numpy as np
import pytest

from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits, normal, wide

pytestmark = pytest.mark.gpu

NUM_STEPS = 200_000


def random_bits(seed: int, *shape: int, low: int, high: int) -> np.ndarray:
    """bf16 bits with exponent fields low .. high, any sign and mantissa."""
    rng = np.random.default_rng(seed)
    fields = rng.integers(low, high + 1, shape) << 7
    return (fields | rng.integers(0, 128, shape) | rng.integers(0, 2, shape) << 15).astype(
        np.uint16
    )


def random_floats(seed: int, n: int, low: int, high: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    fields = rng.integers(low, high + 1, n, dtype=np.uint32) << 23
    bits = fields | rng.integers(0, 1 << 23, n, dtype=np.uint32)
    return (bits | rng.integers(0, 2, n, dtype=np.uint32) << 31).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 64, 65])
def test_every_number_of_steps_is_served(gpu: Ops, twin: Ops, n: int):
    c, a, b = random_floats(n, n, 120, 130), normal(1, n, 16), normal(2, n, 16)

    assert_same_bits(gpu.tensor_core_step(c, a, b), twin.tensor_core_step(c, a, b))


@pytest.mark.parametrize(
    ("c_range", "a_range", "b_range"),
    [
        ((120, 134), (120, 134), (120, 134)),
        ((87, 167), (124, 130), (124, 130)),
        ((0, 254), (1, 254), (1, 126)),
        ((0, 120), (0, 12), (180, 250)),
        ((0, 3), (49, 66), (49, 66)),
        ((0, 0), (0, 0), (0, 254)),
        ((250, 254), (185, 191), (185, 191)),
    ],
    ids=["near", "far-c", "everything", "denormal-in", "denormal-out", "denormal-a", "overflow"],
)
def test_exponents_of_every_kind_give_the_twins_bits(
    gpu: Ops, twin: Ops, c_range: tuple, a_range: tuple, b_range: tuple
):
    c = random_floats(1, NUM_STEPS, *c_range)
    a = random_bits(2, NUM_STEPS, 16, low=a_range[0], high=a_range[1])
    b = random_bits(3, NUM_STEPS, 16, low=b_range[0], high=b_range[1])

    assert_same_bits(gpu.tensor_core_step(c, a, b), twin.tensor_core_step(c, a, b))


def test_cancellation_gives_the_twins_bits(gpu: Ops, twin: Ops):
    a, b = wide(4, NUM_STEPS, 16, spread=5), wide(5, NUM_STEPS, 16, spread=5)
    a[:, 1::2], b[:, 1::2] = a[:, ::2], b[:, ::2] ^ 0x8000
    c = random_floats(6, NUM_STEPS, 90, 110)
    c[::2] = 0

    assert_same_bits(gpu.tensor_core_step(c, a, b), twin.tensor_core_step(c, a, b))


def test_the_largest_sums_of_one_exponent_give_the_twins_bits(gpu: Ops, twin: Ops):
    rng = np.random.default_rng(7)
    a = random_bits(8, NUM_STEPS, 16, low=127, high=127) | 0x7F
    b = random_bits(9, NUM_STEPS, 16, low=127, high=127) | 0x7E
    a[::2], b[::2] = a[::2] & 0x7FFF, b[::2] & 0x7FFF  # every other step adds up all the way
    c = np.where(rng.random(NUM_STEPS) < 0.5, np.float32(1.9999999), np.float32(-3.9999998))

    assert_same_bits(gpu.tensor_core_step(c, a, b), twin.tensor_core_step(c, a, b))


def test_signed_zeros_give_the_twins_bits(gpu: Ops, twin: Ops):
    a = random_bits(10, 4096, 16, low=0, high=0) & 0x8000
    b = random_bits(11, 4096, 16, low=0, high=0) & 0x8000
    c = np.where(np.arange(4096) % 2 == 0, np.float32(0.0), np.float32(-0.0))

    assert_same_bits(gpu.tensor_core_step(c, a, b), twin.tensor_core_step(c, a, b))


def test_nan_and_infinity_give_the_twins_bits(gpu: Ops, twin: Ops):
    rng = np.random.default_rng(12)
    c, a, b = (
        random_floats(13, NUM_STEPS, 120, 134),
        normal(14, NUM_STEPS, 16),
        normal(15, NUM_STEPS, 16),
    )
    specials = np.array([0x7F80, 0xFF80, 0x7FC0, 0x0000], np.uint16)
    for operand in (a, b):
        chosen = rng.random(operand.shape) < 0.02
        operand[chosen] = rng.choice(specials, int(chosen.sum()))
    chosen = rng.random(NUM_STEPS) < 0.1
    c[chosen] = rng.choice(np.array([np.inf, -np.inf, np.nan], np.float32), int(chosen.sum()))

    assert_same_bits(gpu.tensor_core_step(c, a, b), twin.tensor_core_step(c, a, b))
