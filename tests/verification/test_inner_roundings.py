"""A value may differ from the replay where float32 cannot tell on which side of a border it lies.

Correct engines do not differ value by value: a row of RMSNorm has one factor, so all channels of
one significand fall together, and next to a factor like 1.5 most of the row does. Whoever counts
them as chances fails right engines; whoever allows a share of them passes wrong ones.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from verification import measure, replay
from verification.compare import judge_replayed
from verification.diagnosis.fit import diagnose
from verification.diagnosis.scene import Guess
from verification.replay import Replayed
from verification.rounding import neighbour, same_bits, to_bf16

WIDTH, EPS = 576, 1e-5


def normal(rows: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, 1, generator=generator).exp() * scale
    return (torch.randn(rows, WIDTH, generator=generator) * sizes).bfloat16()


def norm_in_float32(x: Tensor, weight: Tensor, ulps: int, eps: float = EPS) -> Tensor:
    """A correct RMSNorm whose factor is some float32 ULPs from the nearest."""
    mean = x.double().square().mean(-1, keepdim=True)
    factor = (1.0 / (mean + eps).sqrt()).float()
    factor = (factor.view(torch.int32) + ulps).view(torch.float32)
    return to_bf16(to_bf16(x.float() * factor).float() * weight.float())


def judged(expected: Replayed, got: Tensor):
    found = measure.replayed(expected, got)
    return judge_replayed(int(found.differing.sum()), got.numel(), int(found.max_ulp.max()), "it")


@pytest.mark.parametrize("ulps", [-4, -1, 0, 1, 4])
def test_a_correct_norm_is_explained_in_every_row(ulps: int):
    x, weight = normal(1 << 15, 1), normal(1, 2)[0]
    expected, got = replay.rms_norm(x, weight, EPS), norm_in_float32(x, weight, ulps)

    per_row = (~same_bits(got, expected.value)).sum(-1)
    assert judged(expected, got).passed
    assert ulps == 0 or int(per_row.max()) >= 10  # what a count of single values would have met


def test_a_row_whose_factor_is_round_is_explained():
    """Every product with 1.5 that needs nine bits lies on a border: it takes the factor's side."""
    x, ones = torch.linspace(0.25, 0.74, WIDTH).bfloat16()[None], torch.ones(WIDTH).bfloat16()
    eps = float(np.float32(4 / 9 - float(x.double().square().mean())))  # the factor is 1.5
    expected = replay.rms_norm(x, ones, eps)

    for ulps in (-1, 1):
        got = norm_in_float32(x, ones, ulps, eps)
        assert judged(expected, got).passed
    both = [norm_in_float32(x, ones, ulps, eps) for ulps in (-1, 1)]
    assert int((~same_bits(*both)).sum()) > WIDTH // 5


@pytest.mark.parametrize("steps", [1, -1])
def test_a_step_away_from_every_border_is_not_explained(steps: int):
    x, ones = normal(8, 3), torch.ones(WIDTH).bfloat16()
    expected = replay.rms_norm(x, ones, EPS)

    got = expected.value.clone()
    got[5, 7] = neighbour(got[5, 7], steps)
    verdict = judged(expected, got)

    assert not verdict.passed
    assert verdict.reason.startswith("1 of 4608 values differ from it")


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_wrong_eps_fails_where_it_moves_a_value(eps: float):
    x, weight = normal(8, 6, 0.02), normal(1, 7)[0]

    assert not judged(replay.rms_norm(x, weight, EPS), replay.rms_norm(x, weight, eps).value).passed


@pytest.mark.parametrize("width", [576, 2048, 8192])
def test_the_sum_of_squares_may_be_taken_in_any_order(width: int):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(256, width, generator=generator).bfloat16()
    weight = torch.ones(width).bfloat16()
    squares = x.float().square()
    one_by_one = torch.zeros(256)
    for column in squares.unbind(1):
        one_by_one = one_by_one + column
    expected = replay.rms_norm(x, weight, EPS)

    for total in (one_by_one, squares.flip(1).sum(1), squares.double().sum(1).float()):
        factor = torch.rsqrt(total / width + EPS)[:, None]
        assert judged(expected, to_bf16(x.float() * factor)).passed


def test_every_gate_of_transformers_silu_is_explained():
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite()][None]
    up = torch.ones_like(gate)
    expected = replay.silu_and_mul(gate, up)

    assert judged(expected, nn.functional.silu(gate) * up).passed
    assert not judged(expected, torch.where(gate < -88, -0.0, expected.value)).passed


def test_a_silu_a_little_too_large_is_not():
    gate = torch.linspace(-8, 8, 4096).bfloat16()[None]
    wide = gate.double()
    got = to_bf16(wide * torch.sigmoid(wide) * (1 + 2e-5))

    assert not judged(replay.silu_and_mul(gate, torch.ones_like(gate)), got).passed


def test_transformers_norm_is_explained():
    x, module = normal(4096, 10), LlamaRMSNorm(WIDTH, EPS).bfloat16()

    assert judged(replay.rms_norm(x, module.weight.data, EPS), module(x).detach()).passed


def test_no_diagnosis_where_the_variant_moves_what_float32_leaves_open():
    """A row of large values: a wrong eps moves the factor by less than an order of sums does."""
    weight = normal(1, 8)[0]
    generator = torch.Generator().manual_seed(9)
    large = (torch.randn(1 << 12, WIDTH, generator=generator) * 4).bfloat16()
    right, wrong = (replay.rms_norm(large, weight, eps) for eps in (EPS, 0.0))
    where = (~same_bits(right.value, wrong.value)).any(-1)
    assert where.any()
    large = large[where]
    right, wrong = (replay.rms_norm(large, weight, eps) for eps in (EPS, 0.0))

    assert diagnose([Guess("eps 0", wrong)], wrong.value, right) is None

    small = normal(8, 9, 0.01)
    right, wrong = (replay.rms_norm(small, weight, eps) for eps in (EPS, 0.0))
    assert "eps 0" in diagnose([Guess("eps 0", wrong)], wrong.value, right)
