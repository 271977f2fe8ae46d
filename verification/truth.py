"""What an operation should give: float64 of the same inputs, and the terms of its error budget.

Knows the mathematics of the linear layer and of causal attention; knows nothing of engines, of taps
or of which error is allowed (`budgets`). Operations whose result is decided by declared roundings
are in `replay`. Weights are upcast once per `LinearTruth`, however many inputs it is given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearExpected:
    """A linear layer's result, float64, and |W| |x|, float32, both [rows, out_features]."""

    value: Tensor
    condition: Tensor
    in_features: int


class LinearTruth:
    """One weight, or several that read the same input, upcast to be multiplied exactly.

    A product of two bfloat16 values is exact in float64, and a sum of K of them carries K * 2^-53
    of rounding: nine orders below the budget. The condition only scales a budget, so float32
    serves.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Args: weights: bfloat16 [out_features, in_features] each, of one in_features."""
        self.sizes = [len(weight) for weight in weights]
        together = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self._weight = together.to(torch.float64).T
        self._magnitude = together.abs().to(torch.float32).T

    def __call__(self, x: Tensor) -> list[LinearExpected]:
        """Each weight's result; x is bfloat16 [rows, in_features]."""
        value = x.to(torch.float64) @ self._weight
        condition = x.to(torch.float32).abs() @ self._magnitude
        return [
            LinearExpected(y, c, x.shape[1])
            for y, c in zip(value.split(self.sizes, 1), condition.split(self.sizes, 1), strict=True)
        ]


@dataclass(frozen=True)
class AttentionExpected:
    """Causal attention in float64 and the parts of its budget, each [rows, num_heads * head_dim].

    Args:
        value: softmax(q Kᵀ / sqrt(head_dim)) V, float64.
        mean_magnitude: sum_j P_j |v_j|, float32.
        spread: sqrt(sum_j P_j^2 v_j^2), float32.
        score_condition: max_j |q| . |k_j| / sqrt(head_dim), float32, [rows, num_heads * head_dim].
        num_tiles: key tiles that a row reads, float32 [rows, 1].
    """

    value: Tensor
    mean_magnitude: Tensor
    spread: Tensor
    score_condition: Tensor
    num_tiles: Tensor
    head_dim: int


KEY_TILE = 128  # keys per attention tile, docs/numerics.md; only the number of folds depends on it


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_position: int,
    head_dim: int,
    visible: Tensor | None = None,
) -> AttentionExpected:
    """Attention of consecutive tokens of one sequence over its keys.

    Args:
        q: bfloat16 [rows, num_heads * head_dim]; row i is at position first_position + i.
        k, v: bfloat16 [num_keys, num_kv_heads * head_dim] from position 0 on; num_keys > last
            position.
        visible: bool [rows, num_keys], another mask than the causal one (for wrong variants).
    """
    rows, num_keys = len(q), len(k)
    num_heads, num_kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
    group = num_heads // num_kv_heads
    q_heads = q.view(rows, num_kv_heads, group, head_dim).to(torch.float64)
    k_heads = k.view(num_keys, num_kv_heads, head_dim).to(torch.float64)
    v_heads = v.view(num_keys, num_kv_heads, head_dim).to(torch.float64)
    positions = torch.arange(first_position, first_position + rows)
    if visible is None:
        visible = torch.arange(num_keys)[None, :] <= positions[:, None]  # [rows, num_keys]
    hidden = ~visible[:, None, :]
    scale = 1.0 / math.sqrt(head_dim)

    value = torch.empty(rows, num_kv_heads, group, head_dim, dtype=torch.float64)
    mean, spread, condition = (torch.empty(value.shape, dtype=torch.float32) for _ in range(3))
    for head in range(num_kv_heads):
        query, key, content = q_heads[:, head], k_heads[:, head], v_heads[:, head]
        scores = (query.reshape(rows * group, head_dim) @ key.T).mul_(scale)
        scores = scores.view(rows, group, num_keys).masked_fill_(hidden, -math.inf)
        p = torch.softmax(scores, -1).view(rows * group, num_keys)
        value[:, head] = (p @ content).view(rows, group, head_dim)
        p = p.to(torch.float32)
        content = content.to(torch.float32)
        mean[:, head] = (p @ content.abs()).view(rows, group, head_dim)
        spread[:, head] = (p.square_() @ content.square()).sqrt_().view(rows, group, head_dim)
        size = query.reshape(rows * group, head_dim).abs().to(torch.float32)
        size = (size @ key.abs().to(torch.float32).T).view(rows, group, num_keys)
        size = size.masked_fill_(hidden, 0.0).amax(-1, keepdim=True) * scale
        condition[:, head] = size.expand(rows, group, head_dim)
    num_tiles = (positions // KEY_TILE + 1).to(torch.float32)[:, None]
    flat = [t.view(rows, num_heads * head_dim) for t in (value, mean, spread, condition)]
    return AttentionExpected(*flat, num_tiles=num_tiles, head_dim=head_dim)
