"""Replays, in torch, the operations whose bits are decided by declared roundings.

Follows the rounding points of docs/numerics.md, which are those of transformers in bfloat16, and
computes what lies between them in float64. Knows nothing of engines or verdicts. Where an engine
may sum in another order (RMSNorm) or use another exp or cos, a value may fall to the other side of
an *inner* rounding. So each such replay also tells whether that explains a differing result: the
exact value must lie as near to the border between two bfloat16 numbers as float32 can err.

No count of differing values is taken: they do not differ one by one. A row of RMSNorm has one
factor; near a border for one significand, all channels of that significand fall together, and near
a factor as round as 1.5 most of the row does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from verification.rounding import neighbour, same_bits, to_bf16, ulp_distance

U32 = 2.0**-24  # of one rounding to float32, at most, relative
# Times the standard deviation of a sum's error, which grows with the root of its length; DESIGN's.
LAMBDA = 6
# Of float32 in gate * sigmoid(gate) at most, beside exp's argument, whose own rounding counts as
# often as the argument is large.
SILU_ROUNDINGS = 16
EXP_OVERFLOWS = math.log(torch.finfo(torch.float32).max)  # beyond, exp in float32 is infinite
TABLE_ROUNDINGS = 8  # of cos and sin in float32: 3.5 ULPs are usual in vector libraries
FREQUENCY_ULPS = (-2, -1, 0, 1, 2)  # of float32: how far two pows lead a frequency apart

# (got, flat indices) -> of each of those values 0: the expected bits; 1: those beyond the border of
# the inner rounding, where the exact value lies at it; else the results' distance in ULPs, 2 at
# least. int64
Explain = Callable[[Tensor, Tensor], Tensor]
# flat indices -> results there, the inner rounding fallen otherwise, and where it may have, bool
Candidates = Callable[[Tensor], list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Replayed:
    """A replayed result.

    Args:
        value: bfloat16 [rows, width].
        explain: whether an inner rounding that fell otherwise explains a value; None where none is
            open, so that every bit must be equal.
    """

    value: Tensor
    explain: Explain | None = None

    def inner_ulps(self, got: Tensor, where: Tensor) -> Tensor:
        """ULPs of `got` at flat indices `where`, as Explain has them, int64."""
        if self.explain is not None:
            return self.explain(got, where)
        return ulp_distance(got.reshape(-1)[where], self.value.reshape(-1)[where])


def _explained_by(value: Tensor, candidates: Candidates) -> Explain:
    """Explains what has the bits of a candidate that is open."""

    def explain(got: Tensor, where: Tensor) -> Tensor:
        expected, got = value.reshape(-1)[where], got.reshape(-1)[where]
        result = ulp_distance(got, expected).clamp_min(2)
        for candidate, is_open in candidates(where):
            result = torch.where(same_bits(candidate, got) & is_open, 1, result)
        return torch.where(same_bits(got, expected), 0, result)

    return explain


def _across_border(
    exact: Tensor, rounded: Tensor, reach: Tensor | float
) -> list[tuple[Tensor, Tensor]]:
    """Both neighbours of some roundings, and whether float32's error may lead to them.

    Args:
        exact: float64.
        rounded: exact in bfloat16.
        reach: the error, relative.
    """
    found = []
    for step in (1, -1):
        moved = neighbour(rounded, step)
        border = (rounded.to(torch.float64) + moved.to(torch.float64)) / 2
        found.append((moved, (exact - border).abs() <= reach * exact.abs()))
    return found


def embedding(table: Tensor, token_ids: Tensor) -> Replayed:
    """Rows of the table: a copy."""
    return Replayed(table[token_ids])


def residual_add(x: Tensor, y: Tensor) -> Replayed:
    """The sum, rounded once: float32 has bits enough to add no second rounding."""
    return Replayed(to_bf16(x.to(torch.float32) + y.to(torch.float32)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Replayed:
    """bf(weight * bf(x / sqrt(mean(x^2) + eps))), statistics in float64, eps as in float32."""
    width = x.shape[-1]
    wide = x.to(torch.float64)
    mean = wide.square().mean(-1, keepdim=True)
    root = (mean + float(np.float32(eps))).sqrt_()
    inner = to_bf16(wide / root)
    # The sum of squares in eight lanes or more, root and product. Summed one by one, errors may
    # lean one way: with a massive channel first and 2047 small ones they reach three times this.
    reach = (LAMBDA + math.sqrt(width)) * U32

    def scaled(inner: Tensor, weight: Tensor) -> Tensor:
        return to_bf16(inner.to(torch.float32) * weight.to(torch.float32))

    def candidates(where: Tensor) -> list[tuple[Tensor, Tensor]]:
        exact = x.reshape(-1)[where].to(torch.float64) / root.reshape(-1)[where // width]
        across = _across_border(exact, inner.reshape(-1)[where], reach)
        return [(scaled(moved, weight[where % width]), is_open) for moved, is_open in across]

    value = scaled(inner, weight)
    return Replayed(value, _explained_by(value, candidates))


def silu_and_mul(gate: Tensor, up: Tensor) -> Replayed:
    """bf(bf(gate * sigmoid(gate)) * up), the sigmoid in float64.

    Of a gate whose exp overflows in float32 (below -88.7) -0 is as right, transformers' own.
    """
    wide = gate.to(torch.float64)
    inner = to_bf16(wide * torch.sigmoid(wide))

    def scaled(inner: Tensor, up: Tensor) -> Tensor:
        return to_bf16(inner.to(torch.float32) * up.to(torch.float32))

    def candidates(where: Tensor) -> list[tuple[Tensor, Tensor]]:
        own = gate.reshape(-1)[where].to(torch.float64)
        reach = (SILU_ROUNDINGS + own.abs()) * U32
        across = _across_border(own * torch.sigmoid(own), inner.reshape(-1)[where], reach)
        vanished = torch.full_like(gate.reshape(-1)[where], -0.0)  # gate / (1 + infinity)
        across.append((vanished, own < -EXP_OVERFLOWS))
        return [(scaled(moved, up.reshape(-1)[where]), is_open) for moved, is_open in across]

    value = scaled(inner, up)
    return Replayed(value, _explained_by(value, candidates))


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    tables: list[tuple[Tensor, Tensor]] | None = None,
) -> Replayed:
    """Half-split rotation, each product and the sum rounded to bfloat16.

    Args:
        x: bfloat16 [rows, num_heads * head_dim].
        cos, sin: bfloat16 [rows, head_dim / 2], a row per row of x.
        tables: others that might have been used, see possible_tables; None: this very one was, so
            that nothing is open: products of bfloat16 are exact in float32.
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

    value = rotated(halves, partner, c, s, sign).reshape(rows, width)
    if tables is None:
        return Replayed(value)

    def candidates(where: Tensor) -> list[tuple[Tensor, Tensor]]:
        row, column = where // width, where % width
        at = (row, column // head_dim, column % head_dim // half, column % half)
        own_x, own_partner, own_sign = (t[at] for t in (halves, partner, sign))
        pair, found = column % half, [(c[at], s[at])]
        for bounds in tables:
            of_cos, of_sin = ([each[row, i] for each in bounds] for i in (pair, half + pair))
            found += product(of_cos, of_sin)
        return [
            (rotated(own_x, own_partner, each_c, each_s, own_sign), torch.tensor(True))
            for each_c, each_s in found
        ]

    return Replayed(value, _explained_by(value, candidates))


def possible_tables(positions: Tensor, inv_freq: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The lowest and the highest that cos, beside it sin, may be: a pair for each frequency.

    A frequency may be some float32 ULPs off, as implementations of pow differ. The angle is one
    rounded product of float32, as in transformers; TABLE_ROUNDINGS are left to cos and sin.

    Args:
        positions: int64.
        inv_freq: float32 [head_dim / 2].

    Returns:
        bfloat16 [positions, head_dim], twice, for each of FREQUENCY_ULPS.
    """
    found, reach = [], TABLE_ROUNDINGS * U32
    for ulps in FREQUENCY_ULPS:
        frequency = (inv_freq.view(torch.int32) + ulps).view(torch.float32)
        angle = (positions.to(torch.float32)[:, None] * frequency).to(torch.float64)
        exact = torch.cat((angle.cos(), angle.sin()), 1)
        found.append((to_bf16(exact * (1 - reach)), to_bf16(exact * (1 + reach))))
    return found


def rope_table(cos: Tensor, sin: Tensor, positions: Tensor, inv_freq: Tensor) -> Replayed:
    """Transformers' cos beside its sin; what is open is each pair's frequency.

    An ULP of a frequency is many bfloat16 ULPs of cos far out, so a value is explained by a table
    of possible_tables; and by one and the same at every position of its pair, which tells a
    frequency from angles that are formed otherwise.

    Args:
        cos, sin: bfloat16 [positions, head_dim / 2].
        positions: int64.
        inv_freq: float32 [head_dim / 2].
    """
    value = torch.cat((cos, sin), 1)
    half = len(inv_freq)
    tables = possible_tables(positions, inv_freq)

    def explain(got: Tensor, where: Tensor) -> Tensor:
        is_met = torch.stack([same_bits(got, low) | same_bits(got, high) for low, high in tables])
        is_met[FREQUENCY_ULPS.index(0)] |= same_bits(got, value)
        is_met = is_met.unflatten(2, (2, half))  # [frequencies, positions, cos or sin, pairs]
        nearest = is_met.sum((1, 2)).argmax(0)
        is_met = is_met.movedim(3, 0)[torch.arange(half), nearest].movedim(0, 2).reshape(-1)
        distance = ulp_distance(got.reshape(-1)[where], value.reshape(-1)[where])
        return torch.where(is_met[where], distance.clamp_max(1), distance.clamp_min(2))

    return Replayed(value, explain)
