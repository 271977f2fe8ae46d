import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verification import budgets
from verification.rounding import half_spacing, to_bf16
from verification.truth import LinearTruth, attention


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)


def test_the_linear_truth_is_exact_for_integers():
    x = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[4.0, 5.0, 6.0], [1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    (result,) = LinearTruth([weight])(x)

    assert result.value.tolist() == [[12.0, 2.0]]
    assert result.condition.tolist() == [[32.0, 6.0]]
    assert result.in_features == 3


def test_weights_that_share_an_input_keep_their_own_results():
    x, a, b = normal(3, 32), normal(5, 32, seed=1), normal(7, 32, seed=2)
    together = LinearTruth([a, b])(x)

    for result, weight in zip(together, (a, b), strict=True):
        (alone,) = LinearTruth([weight])(x)
        assert torch.allclose(result.value, alone.value, rtol=1e-12)


def linear_ratio(x, weight, got):
    (expected,) = LinearTruth([weight])(x)
    tau = budgets.linear(expected)
    return float(((got.double() - expected.value).abs() / tau).max())


@given(st.integers(1, 40), st.integers(1, 128), st.integers(0, 10**6))
def test_a_rounded_float32_sum_in_any_order_is_within_the_budget(rows, steps, seed):
    x, weight = normal(rows, steps * 16, seed=seed), normal(33, steps * 16, seed=seed + 1)
    order = torch.randperm(steps * 16, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(rows, 33)
    for k in order.split(16):
        total = total + x[:, k].float() @ weight[:, k].float().T

    assert linear_ratio(x, weight, to_bf16(total)) <= 1.0


@pytest.mark.parametrize("fault", ["truncated", "bf16-sums", "tail-dropped", "two-rows-swapped"])
def test_a_faulty_linear_layer_is_outside_the_budget(fault):
    x, weight = normal(16, 512), normal(64, 512, seed=1)
    exact = x.float() @ weight.float().T
    if fault == "truncated":
        got = (exact.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
    elif fault == "bf16-sums":
        total = torch.zeros_like(exact)
        for k in range(0, 512, 16):
            total = to_bf16(
                total + x[:, k : k + 16].float() @ weight[:, k : k + 16].float().T
            ).float()
        got = to_bf16(total)
    elif fault == "tail-dropped":
        got = to_bf16(x[:, :-8].float() @ weight[:, :-8].float().T)
    else:
        got = to_bf16(exact)[[1, 0, *range(2, 16)]]

    assert linear_ratio(x, weight, got) > 1.5


def test_the_logits_budget_has_no_room_for_a_rounding():
    x, weight = normal(4, 256), normal(64, 256, seed=1)
    (expected,) = LinearTruth([weight])(x)
    tau = budgets.linear_f32(expected)

    assert ((expected.value.float().double() - expected.value).abs() <= tau).all()
    assert ((to_bf16(expected.value).double() - expected.value).abs() > tau).any()


def test_the_budget_grows_under_cancellation_and_only_there():
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[256.0, -255.0], [0.5, 0.5]], dtype=torch.bfloat16)
    (expected,) = LinearTruth([weight])(x)
    tau = budgets.linear(expected)[0]

    assert expected.value.tolist() == [[1.0, 1.0]]
    assert tau[0] > tau[1] > half_spacing(torch.tensor([1.0]))[0]


def declared_attention(q, k, v, first_position, head_dim, scale_factor=1.0, p_dtype=torch.bfloat16):
    """Attention with the contract's roundings, tile by tile, in float64 otherwise."""
    rows, keys = len(q), len(k)
    heads, kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
    out = torch.empty(rows, heads, head_dim, dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            at = slice(head * head_dim, (head + 1) * head_dim)
            kv = head * kv_heads // heads
            kv_at = slice(kv * head_dim, (kv + 1) * head_dim)
            n = first_position + row + 1
            s = (k[:n, kv_at].double() @ q[row, at].double()) * scale_factor / math.sqrt(head_dim)
            top, total, content = s.max(), 0.0, 0.0
            for start in range(0, min(n, keys), 128):
                tile = s[start : start + 128]
                p = (tile - tile.max()).exp().to(p_dtype).double()
                weight = (tile.max() - top).exp()
                total = total + weight * p.sum()
                content = content + weight * (p @ v[start : start + len(tile), kv_at].double())
            out[row, head] = content / total
    return to_bf16(out.reshape(rows, -1))


def attention_ratio(expected, got):
    return float(((got.double() - expected.value).abs() / budgets.attention(expected)).max())


@pytest.mark.parametrize(("first", "rows"), [(0, 1), (0, 5), (126, 4), (300, 2)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_declared_attention_is_within_the_budget(first, rows, scale):
    q, keys = normal(rows, 4 * 64, scale=scale), first + rows
    k, v = normal(keys, 2 * 64, seed=1, scale=scale), normal(keys, 2 * 64, seed=2)
    expected = attention(q, k, v, first, 64)

    assert attention_ratio(expected, declared_attention(q, k, v, first, 64)) <= 1.0


def test_attention_truth_matches_a_softmax_written_out():
    q, k, v = normal(3, 2 * 64), normal(7, 64, seed=1), normal(7, 64, seed=2)
    expected = attention(q, k, v, 4, 64)
    for row in range(3):
        for head in range(2):
            n = 5 + row
            s = [
                float(q[row, head * 64 : head * 64 + 64].double() @ k[j].double()) / 8
                for j in range(n)
            ]
            p = torch.tensor([math.exp(x - max(s)) for x in s], dtype=torch.float64)
            y = (p / p.sum()) @ v[:n].double()
            assert torch.allclose(expected.value[row, head * 64 : head * 64 + 64], y, rtol=1e-12)


def test_later_keys_do_not_enter_even_if_they_are_not_numbers_of_this_sequence():
    q, k, v = normal(2, 64), normal(4, 64, seed=1), normal(4, 64, seed=2)
    expected = attention(q, k, v, 0, 64)
    k[2:], v[2:] = 77.0, 77.0

    assert torch.equal(attention(q, k, v, 0, 64).value, expected.value)


@pytest.mark.parametrize(
    "fault", ["scale-5-percent", "newest-key-dropped", "one-key-more", "other-head", "eight-bit-p"]
)
def test_faulty_attention_is_outside_the_budget(fault):
    q, k, v = normal(2, 4 * 64), normal(40, 2 * 64, seed=1), normal(40, 2 * 64, seed=2)
    expected = attention(q[:1], k, v, 38, 64)
    if fault == "scale-5-percent":
        got = declared_attention(q[:1], k, v, 38, 64, scale_factor=1.05)
    elif fault == "newest-key-dropped":
        got = declared_attention(q[:1], k, v, 37, 64)
    elif fault == "one-key-more":
        got = declared_attention(q[:1], k, v, 39, 64)
    elif fault == "other-head":
        got = declared_attention(q[:1], k.roll(64, 1), v.roll(64, 1), 38, 64)
    else:
        got = declared_attention(q[:1], k, v, 38, 64, p_dtype=torch.float8_e4m3fn)

    assert attention_ratio(expected, got) > 1.5
