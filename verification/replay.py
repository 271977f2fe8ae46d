"""Replays, in torch, the operations whose bits are decided by declared roundings.

Follows the rounding points of docs/numerics.md, which are those of transformers in bfloat16, and
computes what lies between them in float64. Knows nothing of engines or verdicts. Where an engine
may sum in another order (RMSNorm) or use another exp or cos, a value may fall to the other side of
an *inner* rounding; so each such replay also tells how many ULPs of that inner rounding explain a
differing result.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verification.rounding import neighbour, same_bits, to_bf16, ulp_distance

# Steps tried at the inner rounding; beyond them the result's own distance is reported.
MAX_INNER_ULPS = 4

# (got, flat indices) -> ULPs at the inner rounding that explain each of those values, int64
Explain = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Replayed:
    """A replayed result.

    Args:
        value: bfloat16 [rows, width].
        explain: how far the inner rounding went another way; None where none is open, so that every
            bit must be equal.
    """

    value: Tensor
    explain: Explain | None = None

    def inner_ulps(self, got: Tensor, where: Tensor) -> Tensor:
        """ULPs of `got` at flat indices `where`: at the inner rounding if one is open, int64."""
        if self.explain is not None:
            return self.explain(got, where)
        return ulp_distance(got.reshape(-1)[where], self.value.reshape(-1)[where])


def _by_shifts(value: Tensor, shifted: Callable[[Tensor, int], list[Tensor]]) -> Explain:
    """Explains a value by trying the inner rounding some ULPs further.

    Args:
        shifted: (flat indices, steps) -> the results there, one tensor per way of going that far.
    """

    def explain(got: Tensor, where: Tensor) -> Tensor:
        expected, got = value.reshape(-1)[where], got.reshape(-1)[where]
        result = ulp_distance(got, expected).clamp_min(MAX_INNER_ULPS + 1)
        for steps in range(MAX_INNER_ULPS, 0, -1):
            for signed in (steps, -steps):
                for candidate in shifted(where, signed):
                    result = torch.where(same_bits(candidate, got), steps, result)
        return torch.where(same_bits(got, expected), 0, result)

    return explain


def embedding(table: Tensor, token_ids: Tensor) -> Replayed:
    """Rows of the table: a copy."""
    return Replayed(table[token_ids])


def residual_add(x: Tensor, y: Tensor) -> Replayed:
    """The sum, rounded once: float32 has bits enough to add no second rounding."""
    return Replayed(to_bf16(x.to(torch.float32) + y.to(torch.float32)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Replayed:
    """bf(weight * bf(x / sqrt(mean(x^2) + eps))), statistics in float64, eps as in float32."""
    wide = x.to(torch.float64)
    mean = wide.square().mean(-1, keepdim=True)
    inner = to_bf16(wide / (mean + float(np.float32(eps))).sqrt_())

    def scaled(inner: Tensor, weight: Tensor) -> Tensor:
        return to_bf16(inner.to(torch.float32) * weight.to(torch.float32))

    def shifted(where: Tensor, steps: int) -> list[Tensor]:
        moved = neighbour(inner.reshape(-1)[where], steps)
        return [scaled(moved, weight[where % len(weight)])]

    value = scaled(inner, weight)
    return Replayed(value, _by_shifts(value, shifted))


def silu_and_mul(gate: Tensor, up: Tensor) -> Replayed:
    """bf(bf(gate * sigmoid(gate)) * up), the sigmoid in float64."""
    wide = gate.to(torch.float64)
    inner = to_bf16(wide * torch.sigmoid(wide))

    def scaled(inner: Tensor, up: Tensor) -> Tensor:
        return to_bf16(inner.to(torch.float32) * up.to(torch.float32))

    def shifted(where: Tensor, steps: int) -> list[Tensor]:
        return [scaled(neighbour(inner.reshape(-1)[where], steps), up.reshape(-1)[where])]

    value = scaled(inner, up)
    return Replayed(value, _by_shifts(value, shifted))


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, head_dim: int, is_own_table: bool
) -> Replayed:
    """Half-split rotation, each product and the sum rounded to bfloat16.

    Args:
        x: bfloat16 [rows, num_heads * head_dim].
        cos, sin: bfloat16 [rows, head_dim / 2], a row per row of x.
        is_own_table: cos and sin are the very ones that were used, so nothing is open: products of
            bfloat16 are exact in float32. Else a step of cos or sin is the inner rounding.
    """
    rows, width = x.shape
    half = head_dim // 2
    halves = x.view(rows, width // head_dim, 2, half)
    partner = halves.flip(2)
    c, s = (t[:, None, None, :].expand(halves.shape) for t in (cos, sin))
    sign = torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1).expand(halves.shape)

    def rotated(x: Tensor, partner: Tensor, c: Tensor, s: Tensor, sign: Tensor) -> Tensor:
        along = to_bf16(x.to(torch.float32) * c.to(torch.float32))
        across = to_bf16(partner.to(torch.float32) * s.to(torch.float32))
        return to_bf16(along.to(torch.float32) + sign * across.to(torch.float32))

    def shifted(where: Tensor, steps: int) -> list[Tensor]:
        row, column = where // width, where % width
        at = (row, column // head_dim, column % head_dim // half, column % half)
        here = [t[at] for t in (halves, partner, c, s, sign)]
        candidates = []
        for c_steps, s_steps in ((steps, 0), (0, steps), (steps, steps), (steps, -steps)):
            moved = (neighbour(here[2], c_steps), neighbour(here[3], s_steps))
            candidates.append(rotated(here[0], here[1], *moved, here[4]))
        return candidates

    value = rotated(halves, partner, c, s, sign).reshape(rows, width)
    return Replayed(value, None if is_own_table else _by_shifts(value, shifted))


def rope_table(cos: Tensor, sin: Tensor, positions: Tensor, inv_freq: Tensor) -> Replayed:
    """Transformers' cos beside its sin; the inner rounding that is open is the float32 angle's.

    A frequency or an angle may be a float32 ULP off, as implementations of pow differ. Near a zero
    of cos that is many bfloat16 ULPs, so a value counts as 1 ULP off if an angle that lies within
    two float32 roundings gives it.

    Args:
        cos, sin: bfloat16 [positions, head_dim / 2].
        positions: int64.
        inv_freq: float32 [head_dim / 2].
    """
    value = torch.cat((cos, sin), 1)
    angle = positions.to(torch.float64)[:, None] * inv_freq.to(torch.float64)
    reach = angle * 2.0**-22

    def at(shift: Tensor) -> Tensor:
        return to_bf16(torch.cat(((angle + shift).cos(), (angle + shift).sin()), 1)).float()

    bounds = torch.stack((value.float(), at(-reach), at(reach)))
    low, high = bounds.amin(0).reshape(-1), bounds.amax(0).reshape(-1)

    def explain(got: Tensor, where: Tensor) -> Tensor:
        got = got.reshape(-1)[where]
        distance = ulp_distance(got, value.reshape(-1)[where])
        is_near = (got.float() >= low[where]) & (got.float() <= high[where])
        return torch.where(is_near, distance.clamp_max(1), distance)

    return Replayed(value, explain)
