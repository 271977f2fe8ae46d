import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from verification import replay
from verification.replay import Replayed
from verification.rounding import neighbour, same_bits, to_bf16, ulp_distance


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)


def inner_ulps(expected: Replayed, got: torch.Tensor) -> torch.Tensor:
    where = torch.arange(got.numel())
    return expected.inner_ulps(got, where)


def share_differing(expected: Replayed, got: torch.Tensor) -> float:
    return float((~same_bits(expected.value, got)).double().mean())


@pytest.mark.parametrize("scale", [1e-3, 0.02, 1.0, 1e3])
def test_rms_norm_is_transformers_but_for_a_few_inner_roundings(scale):
    x, module = normal(64, 576, scale=scale), LlamaRMSNorm(576, 1e-5).bfloat16()
    module.weight.data = normal(576, seed=1)
    expected = replay.rms_norm(x, module.weight.data, 1e-5)
    got = module(x).detach()

    assert share_differing(expected, got) <= 1e-3
    assert int(inner_ulps(expected, got).max()) <= 1


def test_silu_and_mul_is_transformers_but_for_a_few_inner_roundings():
    gate, up = normal(64, 512, scale=4.0), normal(64, 512, seed=1)
    expected = replay.silu_and_mul(gate, up)
    got = nn.functional.silu(gate) * up

    assert share_differing(expected, got) <= 1e-3
    assert int(inner_ulps(expected, got).max()) <= 1


def test_rotary_embedding_is_transformers_to_the_bit_given_the_table():
    rows, heads, dim = 9, 3, 64
    x = normal(rows, heads * dim)
    angle = torch.randn(rows, dim // 2, generator=torch.Generator().manual_seed(2)) * 3
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    q = x.view(1, rows, heads, dim).transpose(1, 2)
    both = [torch.cat((t, t), -1)[None] for t in (cos, sin)]
    got = apply_rotary_pos_emb(q, q, *both)[0].transpose(1, 2).reshape(rows, heads * dim)

    assert torch.equal(replay.rotary_embedding(x, cos, sin, dim).value, got)


def test_residual_add_is_transformers_to_the_bit():
    x, y = normal(50, 64, scale=300.0), normal(50, 64, seed=1, scale=0.01)

    assert torch.equal(replay.residual_add(x, y).value, x + y)


def test_copies_and_sums_leave_no_inner_rounding_open():
    x = normal(2, 8)

    assert replay.residual_add(x, x).explain is None
    assert replay.embedding(x, torch.tensor([1, 0])).explain is None
    assert torch.equal(replay.embedding(x, torch.tensor([1, 0])).value, x[[1, 0]])


def test_a_flip_of_the_inner_rounding_counts_as_one_ulp_however_far_the_result_moves():
    x, weight = normal(4096, 64), torch.full((64,), 1.375).bfloat16()
    expected = replay.rms_norm(x, weight, 1e-5)
    factor = (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt().float()
    moved = (factor.view(torch.int32) - 4).view(torch.float32)
    got = to_bf16(to_bf16(x.float() * moved).float() * weight.float())

    assert int(ulp_distance(got, expected.value).max()) > 1
    assert int(inner_ulps(expected, got).max()) == 1


def test_what_no_inner_rounding_explains_is_two_ulps_at_least():
    x, weight = normal(4, 64), normal(64, seed=1)
    expected = replay.rms_norm(x, weight, 1e-5)

    assert int(inner_ulps(expected, neighbour(expected.value, 1)).min()) == 2
    assert int(inner_ulps(expected, neighbour(expected.value, 60)).min()) == 60


def test_a_value_between_the_bounds_of_cos_or_sin_is_explained():
    x, angle = normal(6, 64), torch.rand(6, 32, generator=torch.Generator().manual_seed(1)) + 0.2
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    low, high = torch.cat((cos, sin), 1), torch.cat((cos, neighbour(sin, 1)), 1)

    theirs = replay.rotary_embedding(x, cos, sin, 64, [(low, high)])
    own = replay.rotary_embedding(x, cos, sin, 64)
    for rows, is_explained in ((neighbour(sin, 1), True), (neighbour(sin, 2), False)):
        moved = replay.rotary_embedding(x, cos, rows, 64).value
        assert share_differing(own, moved) > 0.01
        assert (int(inner_ulps(theirs, moved).max()) == 1) is is_explained
    assert own.explain is None


def table(inv_freq: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angle = (positions.float()[:, None] * inv_freq).double()
    return to_bf16(angle.cos()), to_bf16(angle.sin())


INV_FREQ = (1.0 / 10000.0 ** (torch.arange(0, 64, 2).double() / 64)).float()
POSITIONS = torch.arange(0, 16384, 7)


def test_a_table_whose_frequency_is_a_float32_ulp_off_is_explained():
    cos, sin = table(INV_FREQ, POSITIONS)
    expected = replay.rope_table(cos, sin, POSITIONS, INV_FREQ)
    other = INV_FREQ.clone()
    other[1] = torch.nextafter(other[1], torch.tensor(2.0))
    got = torch.cat(table(other, POSITIONS), 1)

    assert share_differing(expected, got) > 0
    assert int(inner_ulps(expected, got).max()) == 1


def test_a_rotation_by_a_frequency_a_float32_ulp_off_is_explained():
    """Far out the cosines lie between those of other frequencies, many bfloat16 ULPs away."""
    positions, x = POSITIONS[-300:] * 8, normal(300, 192)
    cos, sin = table(INV_FREQ, positions)
    tables = replay.possible_tables(positions, INV_FREQ)
    expected = replay.rotary_embedding(x, cos, sin, 64, tables)
    for ulps in (-1, 1):
        other = (INV_FREQ.view(torch.int32) + ulps).view(torch.float32)
        got = replay.rotary_embedding(x, *table(other, positions), 64).value

        assert share_differing(expected, got) > 0.01
        assert int(inner_ulps(expected, got).max()) == 1


def test_an_angle_in_float64_is_not_explained():
    """Its values lie between those of one frequency and of the next, at some positions of each."""
    cos, sin = table(INV_FREQ, POSITIONS)
    expected = replay.rope_table(cos, sin, POSITIONS, INV_FREQ)
    angle = POSITIONS.double()[:, None] * INV_FREQ.double()
    got = torch.cat((to_bf16(angle.cos()), to_bf16(angle.sin())), 1)

    assert int(inner_ulps(expected, got).max()) > 1


@pytest.mark.parametrize("fault", ["bf16-frequencies", "position-plus-one", "sin-for-cos"])
def test_a_faulty_table_is_not_explained(fault):
    cos, sin = table(INV_FREQ, POSITIONS)
    expected = replay.rope_table(cos, sin, POSITIONS, INV_FREQ)
    if fault == "bf16-frequencies":
        got = torch.cat(table(INV_FREQ.bfloat16().float(), POSITIONS), 1)
    elif fault == "position-plus-one":
        got = torch.cat(table(INV_FREQ, POSITIONS + 1), 1)
    else:
        got = torch.cat((sin, cos), 1)

    assert int(inner_ulps(expected, got).max()) > 1
    assert share_differing(expected, got) > 1e-3
