"""Signed statistics: they see errors within every budget that all point one way.

Knows errors, budgets and expected values of one operation; knows nothing of engines or taps.
Rounding noise is taken as uniform with standard deviation s = budget / sqrt 3, so each z below is
N(0, 1) for a correct engine. Only for linear layers and attention: where bfloat16 values meet inner
roundings (RMSNorm, RoPE, SiLU) the noise does not average out, and counts of replayed values serve
instead.

Three directions are summed: gain (error along the value), bias (error along +1) and truncation
(error along the value's sign); over a whole cell, over a row (token) and over a column (channel).
Rows whose result nearly repeats an earlier row's carry the same rounding errors, not new evidence;
sums over rows skip them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Limits of |z|. With 1e4 statistics a run, N(0, 1) alone would need 5.3 for one false alarm in a
# thousand runs; columns have few rows and heavier tails.
MAX_Z_CELL = 6.0
MAX_Z_ROW = 8.0
MAX_Z_COLUMN = 10.0

# Rows closer than this, as a share of their length, round alike: it is five bfloat16 roundings.
SAME_ROW = 0.02
_SKETCH_WIDTH = 16
_SKETCH_SEED = 1


@dataclass(frozen=True)
class SignedSums:
    """Numerators and squared denominators of the three statistics, each [n, 3]."""

    along: Tensor
    weight: Tensor

    def z(self) -> Tensor:
        """The largest |z| of the three, [n]; 0 if nothing was summed, infinite for a NaN."""
        z = (self.along / self.weight.sqrt()).abs()
        z = torch.where((self.weight == 0) & (self.along == 0), 0.0, z)
        return torch.nan_to_num(z, nan=math.inf, posinf=math.inf).amax(-1)

    def total(self, rows: Tensor) -> float:
        """The z of some rows taken together."""
        sums = SignedSums(
            self.along[rows].sum(0, keepdim=True), self.weight[rows].sum(0, keepdim=True)
        )
        return float(sums.z())


class SignedStatistics:
    """Collects the summands of one operation, block of rows by block of rows."""

    def __init__(self, value: Tensor, num_blocks: int = 1) -> None:
        """Takes the expected [rows, width]; num_blocks equal parts of a row may repeat alone."""
        rows, width = value.shape
        self._first = first_occurrences(value, num_blocks)  # [rows, num_blocks]
        self._num_blocks = num_blocks
        self._rows = [torch.zeros(rows, 3) for _ in range(2)]
        self._distinct = [torch.zeros(rows, 3) for _ in range(2)]
        self._columns = [torch.zeros(3, width, dtype=torch.float64) for _ in range(2)]

    def add(self, rows: slice, error: Tensor, budget: Tensor, value: Tensor) -> None:
        """Takes in some rows; error, budget and value are float32 [rows, width]."""
        inverse = (math.sqrt(3.0) / budget).masked_fill_(budget < 1e-18, 0.0)  # a 0 teaches nothing
        relative = error * inverse
        gain = value * inverse
        sign = torch.sign(gain)
        summands = (
            (relative * gain, gain * gain),
            (relative * inverse, inverse * inverse),
            (relative * sign, sign * sign),
        )
        first = self._first[rows].to(torch.float32)
        keep = first.repeat_interleave(value.shape[1] // self._num_blocks, 1)
        ones = torch.ones(value.shape[1])
        for kind, pair in enumerate(summands):
            for part, summand in enumerate(pair):
                total = summand @ ones
                self._rows[part][rows, kind] = total
                if self._num_blocks == 1:
                    self._distinct[part][rows, kind] = total * first[:, 0]
                    self._columns[part][kind] += first[:, 0] @ summand
                else:
                    summand = summand.mul_(keep)
                    self._distinct[part][rows, kind] = summand @ ones
                    self._columns[part][kind] += torch.ones(len(summand)) @ summand

    def of_rows(self) -> Tensor:
        """Largest |z| of each row, repeated or not, [rows]."""
        return SignedSums(*self._rows).z()

    def of_columns(self) -> Tensor:
        """Largest |z| of each column over distinct rows, [width]."""
        return SignedSums(*(sums.T for sums in self._columns)).z()

    def sums(self) -> SignedSums:
        """The sums of each row, nothing where it repeats an earlier one."""
        return SignedSums(*(sums.to(torch.float64) for sums in self._distinct))


def first_occurrences(value: Tensor, num_blocks: int = 1) -> Tensor:
    """Which rows do not nearly repeat an earlier one, bool [rows, num_blocks].

    Rows are compared by a random projection of each of their num_blocks equal parts, scaled to unit
    length. Sorted along one direction of it, near rows are near: each row is compared with those
    that follow in that order until none is within reach.
    """
    rows, width = value.shape
    part = width // num_blocks
    generator = torch.Generator().manual_seed(_SKETCH_SEED)
    projection = torch.randn(part, _SKETCH_WIDTH, generator=generator) / math.sqrt(_SKETCH_WIDTH)
    parts = value.to(torch.float32).view(rows, num_blocks, part).transpose(0, 1)
    sketch = torch.nn.functional.normalize(parts, dim=-1) @ projection  # [num_blocks, rows, sketch]
    order = sketch[..., 0].argsort(dim=1, stable=True)
    sketch = sketch.gather(1, order[..., None].expand(sketch.shape))
    first = torch.ones(num_blocks, rows, dtype=torch.bool)
    for shift in range(1, rows):
        reach = sketch[:, shift:, 0] - sketch[:, :-shift, 0]
        if not bool((reach < SAME_ROW).any()):
            break
        apart = (sketch[:, shift:] - sketch[:, :-shift]).square_().sum(-1)
        block, at = (apart < SAME_ROW**2).nonzero(as_tuple=True)
        later = torch.maximum(order[block, at], order[block, at + shift])
        first[block, later] = False
    return first.T
