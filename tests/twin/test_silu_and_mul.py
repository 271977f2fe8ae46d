"""SiLU times up: the page's exp2, two roundings, and every bf16 gate there is."""

import numpy as np
import pytest

from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits, normal, wide


def every_value() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).reshape(64, 1024)


@pytest.mark.parametrize("up", [0x3F80, 0xBFC0, 0x4049, 0x0001], ids=["1", "-1.5", "pi", "tiny"])
def test_every_finite_gate_has_the_contracts_bits(twin: Ops, up: int):
    gate = every_value()
    finite = (gate & 0x7F80) != 0x7F80
    ups = np.full_like(gate, up)

    result, expected = twin.silu_and_mul(gate, ups), contract.silu_and_mul(gate, ups)

    assert_same_bits(result[finite], expected[finite])


@pytest.mark.parametrize("draw", [normal, wide])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 320), (17, 832)])
def test_random_values_have_the_contracts_bits(twin: Ops, draw, shape: tuple[int, int]):
    gate, up = draw(1, *shape), draw(2, *shape)

    assert_same_bits(twin.silu_and_mul(gate, up), contract.silu_and_mul(gate, up))


def test_silu_is_rounded_before_the_product(twin: Ops):
    gate, up = normal(3, 64, 320), normal(4, 64, 320)

    silu = twin.silu_and_mul(gate, np.full_like(gate, 0x3F80))

    product = contract.bf(contract.widen(silu) * contract.widen(up))
    assert_same_bits(twin.silu_and_mul(gate, up), product)


def test_the_value_is_silu_and_not_a_relative_of_it(twin: Ops):
    gate = normal(5, 64, 320, scale=3)
    g = contract.widen(gate).astype(np.float64)

    silu = contract.widen(twin.silu_and_mul(gate, np.full_like(gate, 0x3F80)))

    # one rounding to bf16, plus the float32 steps before it
    truth = g / (1 + np.exp(-g))
    assert (np.abs(silu - truth) <= np.abs(truth) * (2.0**-8 + 2.0**-20)).all()


@pytest.mark.parametrize(
    ("gate", "expected"),
    [(0x7F80, 0x7F80), (0xC300, 0x8000), (0x4300, 0x4300), (0x0000, 0x0000), (0x8000, 0x8000)],
    ids=["inf", "-128", "128", "0", "-0"],
)
def test_the_ends_of_the_range(twin: Ops, gate: int, expected: int):
    gates = np.full((1, 1), gate, np.uint16)

    result = twin.silu_and_mul(gates, np.full((1, 1), 0x3F80, np.uint16))

    assert result[0, 0] == expected


def test_gate_and_up_are_not_exchangeable(twin: Ops):
    gate, up = normal(6, 4, 64), normal(7, 4, 64)

    assert (twin.silu_and_mul(gate, up) != twin.silu_and_mul(up, gate)).mean() > 0.9
