"""Rotary embedding: the GPU's bits are the twin's."""

import numpy as np
import pytest

from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits, wide

pytestmark = pytest.mark.gpu

MAX_POSITIONS = 4096


def rope_like_table() -> np.ndarray:
    """Cosines and sines of some angles as bf16 bits; which angles does not matter here."""
    angles = np.outer(np.arange(MAX_POSITIONS), 10000.0 ** (-np.arange(32) / 32))
    values = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("num_heads", [1, 3, 8, 32])
def test_every_number_of_heads_gives_the_twins_bits(gpu: Ops, twin: Ops, num_heads: int):
    x = wide(num_heads, 50, num_heads, 64, spread=8)
    positions = np.random.default_rng(1).integers(0, MAX_POSITIONS, 50).astype(np.int32)
    positions[:2] = 0, MAX_POSITIONS - 1
    table = rope_like_table()

    assert_same_bits(
        gpu.rotary_embedding(x, table, positions), twin.rotary_embedding(x, table, positions)
    )
