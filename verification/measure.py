"""Measures what an operation gave against what was expected: numbers per row, no verdicts.

Two measures: `bounded` (error over budget, signed statistics) and `replayed` (values that differ,
and by how many ULPs). Knows tensors of one operation; which numbers are good enough is decided in
`compare`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verification.replay import Replayed
from verification.rounding import (
    HISTOGRAM_BINS,
    histogram,
    same_bits,
    to_bf16,
    ulp_distance,
)
from verification.signed_statistics import SignedStatistics, SignedSums

VALUES_AT_ONCE = 1 << 17  # keeps a block's temporaries in the cache


@dataclass(frozen=True)
class Measured:
    """One operation's numbers, row by row.

    Args:
        width: values per row.
        ratio: largest |error| / budget of each row, infinite for a NaN; None for replayed
            operations.
        differing: values of each row that are not the expected bits; None where no bits are
            expected.
        max_ulp: largest ULP distance of each row, likewise.
        histogram: values by ULP distance, rounding.HISTOGRAM_BINS of them.
        z_row, z_sums, z_column: signed statistics; distinct rows only in sums and columns.
    """

    width: int
    ratio: Tensor | None
    differing: Tensor | None
    max_ulp: Tensor | None
    histogram: list[int]
    z_row: Tensor | None = None
    z_sums: SignedSums | None = None
    z_column: Tensor | None = None


@dataclass(frozen=True)
class Element:
    """One value of a tap: where it is, what came and what was expected."""

    row: int
    column: int
    got: float
    expected: float
    ulps: int | None
    budget: float | None


def bounded(
    value: Tensor,
    budget: Callable[[slice], Tensor],
    got: Tensor,
    *,
    is_signed: bool = True,
    num_blocks: int = 1,
) -> Measured:
    """Error over budget of every element.

    Args:
        value: expected, float64 [rows, width].
        budget: gives the budgets of some rows, float32.
        got: bfloat16 or float32 [rows, width].
        is_signed: take the signed statistics too.
        num_blocks: parts of a row (attention heads) that may repeat on their own.
    """
    rows, width = value.shape
    ratio = torch.empty(rows)
    has_bits = got.dtype == torch.bfloat16
    differing, max_ulp = (torch.zeros(rows, dtype=torch.int64) for _ in range(2))
    counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64)
    signed = SignedStatistics(value, num_blocks) if is_signed else None
    at_once = max(1, VALUES_AT_ONCE // width)
    for start in range(0, rows, at_once):
        at = slice(start, min(start + at_once, rows))
        tau = budget(at)
        error = (got[at].to(torch.float64) - value[at]).to(torch.float32)
        ratio[at] = _worst_ratio(error, tau)
        if has_bits:
            rounded = to_bf16(value[at])
            distances = _count(got[at], rounded, differing[at], max_ulp[at])
            counts += torch.tensor(histogram(distances, rounded.numel()))
        if signed is not None:
            signed.add(at, error, tau, value[at].to(torch.float32))
    return Measured(
        width,
        ratio,
        differing if has_bits else None,
        max_ulp if has_bits else None,
        counts.tolist(),
        z_row=signed.of_rows() if signed else None,
        z_sums=signed.sums() if signed else None,
        z_column=signed.of_columns() if signed else None,
    )


def replayed(expected: Replayed, got: Tensor) -> Measured:
    """Values that differ from a replay, ULPs taken at the inner rounding where there is one."""
    rows, width = got.shape
    differing, max_ulp = (torch.zeros(rows, dtype=torch.int64) for _ in range(2))
    distances = _count(got, expected.value, differing, max_ulp, expected.inner_ulps)
    return Measured(width, None, differing, max_ulp, histogram(distances, got.numel()))


def _worst_ratio(error: Tensor, budget: Tensor) -> Tensor:
    """Largest |error| / budget per row; 0 / 0 is 0, anything not finite is infinite."""
    size = error.abs()
    ratio = torch.where(size == 0, 0.0, size / budget).amax(-1)
    return torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf)


def _count(
    got: Tensor,
    expected: Tensor,
    differing: Tensor,
    max_ulp: Tensor,
    ulps: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Fills the per-row counts and returns the distances of the values that differ."""
    unequal = ~same_bits(got, expected)
    where = unequal.reshape(-1).nonzero()[:, 0]
    if len(where) == 0:
        return where
    if ulps is not None:
        distance = ulps(got, where)
    else:
        distance = ulp_distance(got.reshape(-1)[where], expected.reshape(-1)[where])
    # Other bits are a difference of at least 1: the sign of a zero, a NaN's payload.
    distance = distance.clamp_min(1)
    row = where // got.shape[1]
    differing.index_add_(0, row, torch.ones_like(row))
    max_ulp.scatter_reduce_(0, row, distance, "amax")
    return distance


def worst_bounded(value: Tensor, tau: Tensor, got: Tensor, rows: slice) -> Element:
    """The element furthest beyond its budget among some rows."""
    error = (got[rows].to(torch.float64) - value[rows]).abs()
    ratio = torch.where(error == 0, 0.0, error / tau)
    ratio = torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf)
    row, column = divmod(int(ratio.argmax()), value.shape[1])
    return _element(got[rows], value[rows], row, column, rows.start, float(tau[row, column]))


def worst_replayed(expected: Tensor, got: Tensor, rows: slice) -> Element:
    """The element most ULPs from a value of its own format among some rows."""
    distance = ulp_distance(got[rows], expected[rows])
    row, column = divmod(int(distance.argmax()), expected.shape[1])
    return _element(got[rows], expected[rows], row, column, rows.start, None)


def worst_explained(expected: Replayed, got: Tensor, rows: slice) -> Element:
    """The element among some rows that the open roundings explain least; ties: the first."""
    where, ulps = _differing(expected, got, rows)
    if len(where) == 0:
        return worst_replayed(expected.value, got, rows)
    row, column = divmod(int(where[ulps.argmax()]), got.shape[1])
    return _element(got[rows], expected.value[rows], row, column, rows.start, None)


def max_inner_ulp(expected: Replayed, got: Tensor, rows: slice) -> int:
    """The largest of replay.Explain among some rows; 0 where every bit is the expected one."""
    _, ulps = _differing(expected, got, rows)
    return int(ulps.max()) if len(ulps) else 0


def _differing(expected: Replayed, got: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Flat indices within the rows of what differs, and replay.Explain of each."""
    unequal = ~same_bits(got[rows], expected.value[rows])
    where = unequal.reshape(-1).nonzero()[:, 0]
    if len(where) == 0:  # the usual case, for which nothing need be explained
        return where, where
    return where, expected.inner_ulps(got, rows.start * got.shape[1] + where)


def _element(
    got: Tensor, expected: Tensor, row: int, column: int, first_row: int, budget: float | None
) -> Element:
    value = expected[row, column]
    same_format = value.to(torch.float32).to(got.dtype)
    ulps = int(ulp_distance(got[row, column], same_format))
    return Element(first_row + row, column, float(got[row, column]), float(value), ulps, budget)
