"""Fused linear layers: the GPU's bits are those of the twin's operations, one after another.

Sizes: rows and tokens around the tiles of 128, in_features below, at and beyond chunks of 512; with
whole pairs of chunks and few tiles a tile is shared by two thread blocks.
"""

import numpy as np
import pytest

from engine.errors import InvalidArgument
from engine.ops import Ops
from tests.kernels.inputs import NUM_TOKENS, assert_same_bits, normal, wide

pytestmark = pytest.mark.gpu

TOKENS = tuple(n for n in NUM_TOKENS if n > 32)  # fewer take the operations one by one
SHAPES = [(64, 64), (576, 200), (1024, 128), (1024, 320), (2048, 192), (3072, 264), (8192, 136)]
NAN = 0x7FC0


def inputs(in_features: int, out_features: int, num_tokens: int) -> tuple[np.ndarray, ...]:
    x = normal(in_features, num_tokens, in_features)
    x[::3] = wide(in_features + 1, *x[::3].shape)  # every third token spreads its exponents
    weights = [normal(seed, out_features, in_features, scale=0.05) for seed in (7, 8)]
    return x, *weights, normal(9, num_tokens, out_features, scale=3.0)


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_a_linear_layer_added_to_the_residual_gives_the_twins_bits(
    gpu: Ops, twin: Ops, in_features: int, out_features: int
):
    x, weight, _, residual = inputs(in_features, out_features, max(TOKENS))
    expected = twin.residual_add(twin.linear(x, weight), residual)

    for n in TOKENS:
        assert_same_bits(gpu.linear_add(x[:n], weight, residual[:n]), expected[:n])


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_a_gated_linear_layer_gives_the_twins_bits(
    gpu: Ops, twin: Ops, in_features: int, out_features: int
):
    x, gate, up, _ = inputs(in_features, out_features, max(TOKENS))
    expected = twin.silu_and_mul(twin.linear(x, gate), twin.linear(x, up))

    for n in TOKENS:
        assert_same_bits(gpu.gated_linear(x[:n], gate, up), expected[:n])


@pytest.mark.parametrize(("in_features", "out_features"), [(1024, 128), (576, 200)])
def test_a_row_of_nan_leaves_its_neighbours_bits_alone(
    gpu: Ops, in_features: int, out_features: int
):
    x, weight, up, residual = inputs(in_features, out_features, 200)
    clean = gpu.linear_add(x, weight, residual), gpu.gated_linear(x, weight, up)
    x[77] = NAN

    poisoned = gpu.linear_add(x, weight, residual), gpu.gated_linear(x, weight, up)

    for actual, expected in zip(poisoned, clean, strict=True):
        assert (actual[77] == 0x7FFF).all()
        assert_same_bits(np.delete(actual, 77, 0), np.delete(expected, 77, 0))


def test_two_hundred_runs_of_a_shared_tile_give_the_same_bits(gpu: Ops):
    x, weight, _, residual = inputs(2048, 128, 128)
    first = gpu.linear_add(x, weight, residual)

    for _ in range(200):
        assert_same_bits(gpu.linear_add(x, weight, residual), first)


@pytest.mark.parametrize(("in_features", "out_features"), [(48, 64), (64, 12)])
def test_sizes_that_are_no_multiples_are_refused(gpu: Ops, in_features: int, out_features: int):
    x, weight, up, residual = inputs(in_features, out_features, 40)

    with pytest.raises(InvalidArgument, match="must be a multiple of"):
        gpu.linear_add(x, weight, residual)
    with pytest.raises(InvalidArgument, match="must be a multiple of"):
        gpu.gated_linear(x, weight, up)
