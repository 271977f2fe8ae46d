"""silu_and_mul, residual_add, exp2: the GPU's bits are the twin's, for every bf16 value."""

import numpy as np
import pytest

from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits, normal, wide

pytestmark = pytest.mark.gpu

EVERY_BF16 = np.arange(1 << 16, dtype=np.uint16)
LENGTHS = (1, 7, 8, 9, 2047, 2048, 2049, 100_003)


@pytest.mark.parametrize("seed", range(4))
def test_silu_of_every_gate_gives_the_twins_bits(gpu: Ops, twin: Ops, seed: int):
    gate = EVERY_BF16.reshape(64, 1024)
    up = wide(seed, 64, 1024, spread=10)

    assert_same_bits(gpu.silu_and_mul(gate, up), twin.silu_and_mul(gate, up))


@pytest.mark.parametrize("length", LENGTHS)
def test_silu_and_mul_of_every_length_gives_the_twins_bits(gpu: Ops, twin: Ops, length: int):
    gate, up = normal(length, 1, length, scale=3.0), normal(length + 1, 1, length)

    assert_same_bits(gpu.silu_and_mul(gate, up), twin.silu_and_mul(gate, up))


@pytest.mark.parametrize("seed", range(8))
def test_sums_of_every_value_with_some_other_give_the_twins_bits(gpu: Ops, twin: Ops, seed: int):
    other = np.random.default_rng(seed).permutation(EVERY_BF16)

    assert_same_bits(gpu.residual_add(EVERY_BF16, other), twin.residual_add(EVERY_BF16, other))


@pytest.mark.parametrize("length", LENGTHS)
def test_residual_add_of_every_length_gives_the_twins_bits(gpu: Ops, twin: Ops, length: int):
    x, y = normal(length, length), normal(length + 1, length)

    assert_same_bits(gpu.residual_add(x, y), twin.residual_add(x, y))


def test_exp2_of_bit_patterns_all_over_float32_gives_the_twins_bits(gpu: Ops, twin: Ops):
    # 65536 upper halves, 16 random lower halves each.
    rng = np.random.default_rng(1)
    low = rng.integers(0, 1 << 16, (1 << 16, 16), dtype=np.uint32)
    x = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | low).view(np.float32).ravel()

    assert_same_bits(gpu.exp2(x), twin.exp2(x), any_nan=True)


def test_exp2_around_integers_halves_and_its_ends_gives_the_twins_bits(gpu: Ops, twin: Ops):
    centres = np.arange(-260, 261, dtype=np.float32) / 2
    ulps = np.arange(-40, 41)
    x = (centres[:, None] + np.spacing(centres)[:, None] * ulps).astype(np.float32).ravel()

    assert_same_bits(gpu.exp2(x), twin.exp2(x))


def test_exp2_of_dense_values_in_its_range_gives_the_twins_bits(gpu: Ops, twin: Ops):
    x = np.random.default_rng(2).uniform(-127, 129, 1 << 21).astype(np.float32)

    assert_same_bits(gpu.exp2(x), twin.exp2(x))
