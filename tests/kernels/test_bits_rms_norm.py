"""RMSNorm: the GPU's bits are the twin's."""

import numpy as np
import pytest

from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits, normal, wide

pytestmark = pytest.mark.gpu

# Around a lane's run of 8 and a pass of 2048 values; 1, 100 and 2049 are no multiples of 8.
HIDDEN_SIZES = (1, 8, 64, 100, 576, 2040, 2048, 2049, 2056, 8192)


@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_every_hidden_size_gives_the_twins_bits(gpu: Ops, twin: Ops, hidden_size: int):
    x, weight = wide(hidden_size, 40, hidden_size, spread=4), normal(2, hidden_size)

    assert_same_bits(gpu.rms_norm(x, weight, 1e-5), twin.rms_norm(x, weight, 1e-5))


# A last bit of a row's scale changes one value in some ten thousand after rounding to bf16, and a
# last bit of its mean, where the width is no power of two, one in three hundred thousand.
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1 << 19, 24), (2048, 2048)])
def test_millions_of_values_show_a_scale_that_is_off_by_its_last_bit(
    gpu: Ops, twin: Ops, num_tokens: int, hidden_size: int
):
    x, weight = wide(3, num_tokens, hidden_size, spread=1), normal(4, hidden_size)

    assert_same_bits(gpu.rms_norm(x, weight, 1e-5), twin.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("exponent", [-130, -80, -64, 62, 63, 64, 100])
def test_sums_that_underflow_and_overflow_give_the_twins_bits(gpu: Ops, twin: Ops, exponent: int):
    rng = np.random.default_rng(1)
    x = normal(3, 4, 576).view(np.uint16).astype(np.uint32) << 16
    scaled = np.ldexp(
        x.view(np.float32).astype(np.float64), exponent + rng.integers(-2, 3, x.shape)
    )
    bits = (scaled.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    assert_same_bits(
        gpu.rms_norm(bits, normal(4, 576), 0.0), twin.rms_norm(bits, normal(4, 576), 0.0)
    )


def test_rows_of_zero_nan_and_infinity_give_the_twins_bits_and_disturb_nobody(gpu: Ops, twin: Ops):
    x, weight = normal(5, 6, 2048), normal(6, 2048)
    x[1], x[2, 7], x[4, 2047] = 0, 0x7FC0, 0xFF80

    assert_same_bits(gpu.rms_norm(x, weight, 1e-5), twin.rms_norm(x, weight, 1e-5))
