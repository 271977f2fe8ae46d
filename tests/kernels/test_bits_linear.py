"""Linear layers: the GPU's bits are the twin's, for every number of tokens and every tail."""

from functools import cache

import numpy as np
import pytest

from engine.ops import Ops
from tests.kernels.inputs import NUM_TOKENS, assert_same_bits, normal, wide

pytestmark = pytest.mark.gpu

# In: below a k tile's end, inside and at the end of chunks of 512. Out: tails of tiles of 64, 128.
IN_FEATURES = (16, 48, 64, 512, 576, 832, 2048, 8192)
OUT_FEATURES = (1, 64, 192, 320, 576, 1000)
NAN = 0x7FC0


@cache
def problem(in_features: int, out_features: int) -> tuple[np.ndarray, np.ndarray]:
    x = normal(in_features, max(NUM_TOKENS), in_features)
    x[::3] = wide(in_features + 1, *x[::3].shape)  # every third token spreads its exponents
    return x, normal(out_features, out_features, in_features, scale=0.05)


@pytest.fixture(scope="module")
def expected(twin: Ops):
    """The twin's rows, computed once: a token's row does not depend on the others."""

    @cache
    def rows(in_features: int, out_features: int) -> np.ndarray:
        return twin.linear_f32(*problem(in_features, out_features))

    return rows


@pytest.mark.parametrize("out_features", OUT_FEATURES)
@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_every_number_of_tokens_gives_the_twins_bits(
    gpu: Ops, expected, in_features: int, out_features: int
):
    x, weight = problem(in_features, out_features)

    for num_tokens in NUM_TOKENS:
        result = gpu.linear_f32(x[:num_tokens], weight)
        assert_same_bits(result, expected(in_features, out_features)[:num_tokens])


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 17, 33, 300])
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 1000), (2048, 320)])
def test_the_rounded_result_is_the_twins_too(
    gpu: Ops, twin: Ops, in_features: int, out_features: int, num_tokens: int
):
    x, weight = problem(in_features, out_features)

    assert_same_bits(gpu.linear(x[:num_tokens], weight), twin.linear(x[:num_tokens], weight))


@pytest.mark.parametrize("num_tokens", [3, 8, 16, 20, 32, 33, 200])
def test_a_row_of_nan_leaves_its_neighbours_bits_alone(gpu: Ops, expected, num_tokens: int):
    x, weight = problem(832, 320)
    poisoned = x[:num_tokens].copy()
    poisoned[1] = NAN

    result = gpu.linear_f32(poisoned, weight)

    others = np.arange(num_tokens) != 1
    assert np.isnan(result[1]).all()
    assert_same_bits(result[others], expected(832, 320)[:num_tokens][others])


@pytest.mark.parametrize("num_tokens", [1, 16, 32, 129])
def test_a_token_gets_the_same_bits_at_every_place_in_the_batch(
    gpu: Ops, expected, num_tokens: int
):
    x, weight = problem(2048, 192)
    order = np.random.default_rng(num_tokens).permutation(len(x))[:num_tokens]

    assert_same_bits(gpu.linear_f32(x[order], weight), expected(2048, 192)[order])


@pytest.mark.parametrize("num_tokens", [4, 24, 160])
def test_zeros_and_denormals_give_the_twins_bits(gpu: Ops, twin: Ops, num_tokens: int):
    rng = np.random.default_rng(num_tokens)
    x = wide(5, num_tokens, 1088, spread=60)
    x[rng.random(x.shape) < 0.3] = 0
    x[rng.random(x.shape) < 0.1] = 0x8003  # a negative denormal
    weight = wide(6, 130, 1088, spread=60)
    weight[rng.random(weight.shape) < 0.3] = 0x8000

    assert_same_bits(gpu.linear_f32(x, weight), twin.linear_f32(x, weight))


def test_every_output_of_a_vocabulary_sized_layer_is_written(gpu: Ops, twin: Ops):
    x, weight = normal(1, 2, 64), normal(2, 128_256, 64, scale=0.05)

    assert_same_bits(gpu.linear_f32(x, weight), twin.linear_f32(x, weight))
