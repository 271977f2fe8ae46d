"""Decides whether a guess explains an output, and which of several is told.

A guess of bits must be met in all values but the few that fall to the other side of an inner
rounding; a guess in float64 must hold the operator's own budget and signed statistics. And it must
differ from what is right where the output does: a guess that the right result would meet as well,
or that only float32's own error tells from it, explains nothing.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from verification import compare, measure
from verification.diagnosis.scene import Guess, Result
from verification.expected import Bounded
from verification.replay import Replayed
from verification.rounding import same_bits, ulp_distance

# A guess that is defined on less than half of the rows is not tried.

# Of a guess nobody knows how near its borders were, so few values may differ: 1 in 1000, and of a
# small number what chance gives at the rate of correct engines, 3 of 10,000 at most (measured).
MAX_DIFFERING = 1e-3
USUAL_DIFFERING = 3e-4
_CHANCE = 1e-6


@dataclass(frozen=True)
class Fit:
    """How well a guess explains an output.

    Args:
        differing: values whose bits are not the guess's, rounded.
        ratio: largest |error| / budget; None for guesses of bits.
        rows: rows that the guess covers.
    """

    words: str
    differing: int
    ulps: int
    values: int
    ratio: float | None
    rows: int
    num_rows: int

    @property
    def sentence(self) -> str:
        """For the report."""
        if self.ratio is not None:
            how = f"within its own budget, {self.ratio:.2f} of it at most"
        elif self.differing == 0:
            how = f"to the bit, {self.values} values"
        else:
            equal = self.values - self.differing
            how = (
                f"{equal} of {self.values} values to the bit, the rest at most {self.ulps} ULP off"
            )
        if self.rows < self.num_rows:
            how += f"; tried on {self.rows} of {self.num_rows} rows"
        return f"your output equals {self.words} ({how})"


def diagnose(
    guesses: Iterable[Guess], got: Tensor, right: Replayed | Bounded | Tensor
) -> str | None:
    """The sentence of the guess that fits best, and those that these inputs cannot tell from it.

    Args:
        got: the output, bfloat16 or float32 [rows, width], or int64 [rows].
        right: what it should have been; an output that meets it is not explained.
    """
    fits = [(fit, guess) for guess in guesses if (fit := fitted(guess, got, right)) is not None]
    if not fits:
        return None
    fits.sort(key=lambda pair: (pair[0].num_rows - pair[0].rows, pair[0].differing))  # stable
    best = fits[0][0]
    alike = [
        fit.words for fit, _ in fits[1:] if (fit.differing, fit.rows) == (best.differing, best.rows)
    ]
    if not alike:
        return best.sentence
    return f"{best.sentence}; on these inputs also {'; '.join(alike)}"


def fitted(guess: Guess, got: Tensor, right: Result) -> Fit | None:
    """How the guess fits, or None."""
    rows = torch.arange(len(got)) if guess.rows is None else guess.rows.nonzero()[:, 0]
    if 2 * len(rows) < len(got) or _holds(got, rows, right):
        return None
    if isinstance(guess.result, Bounded):
        found = _bounded(guess.result, got, rows)
    else:
        found = _bits(guess.result, got, rows)
        if found is not None and found[0] >= max(
            1, _differing(_value(right, got.dtype), got, rows)[0]
        ):
            return None  # no nearer than what is right
        if _is_as_right(guess.result, right, rows):
            return None
    if found is None:
        return None
    differing, ulps, ratio = found
    return Fit(guess.words, differing, ulps, got[rows].numel(), ratio, len(rows), len(got))


def _holds(got: Tensor, rows: Tensor, right: Result) -> bool:
    """Whether these rows of the output are right, so that there is nothing to explain."""
    if isinstance(right, Bounded):
        return _bounded(right, got, rows) is not None
    return _differing(_value(right, got.dtype), got, rows)[0] == 0


def _bits(result: Replayed | Tensor, got: Tensor, rows: Tensor) -> tuple[int, int, None] | None:
    """Values that differ and by how much, None where they are too many."""
    if isinstance(result, Replayed) and result.explain is not None:
        measured = measure.replayed(result, got)
        differing, ulps = int(measured.differing[rows].sum()), int(measured.max_ulp[rows].max())
        is_met = compare.judge_replayed(differing, got[rows].numel(), ulps, "").passed
        return (differing, ulps, None) if is_met else None
    differing, ulps = _differing(_value(result, got.dtype), got, rows)
    allowed = allowed_differing(got[rows].numel()) if got.is_floating_point() else 0
    return (differing, ulps, None) if differing <= allowed else None


def allowed_differing(num_values: int) -> int:
    """How many values may differ from a guess: 1 in 1000, or chance's share of a small number."""
    return max(math.floor(num_values * MAX_DIFFERING), _poisson_limit(num_values * USUAL_DIFFERING))


def _poisson_limit(mean: float) -> int:
    """The smallest count that Poisson(mean) exceeds with probability below _CHANCE."""
    if mean > 700:  # exp underflows; far below 1 in 1000 of such a number anyway
        return 0
    term = below = math.exp(-mean)
    count = 0
    while 1.0 - below > _CHANCE:
        count += 1
        term *= mean / count
        below += term
    return count


def _is_as_right(guess: Result, right: Result, rows: Tensor) -> bool:
    """Whether a right engine may give what the guess gives."""
    if not isinstance(right, Replayed) or right.explain is None:
        return False
    value = _value(guess, torch.bfloat16).to(torch.bfloat16)
    ulps = int(measure.replayed(right, value).max_ulp[rows].max())
    return compare.judge_replayed(0, value.numel(), ulps, "").passed


def _bounded(result: Bounded, got: Tensor, rows: Tensor) -> tuple[int, int, float] | None:
    """Values that differ from the rounded guess, and the ratio; None where it does not hold."""
    value, taken = result.value[rows], got[rows]
    if not value.isfinite().all():
        return None
    tau = result.budget(slice(0, len(result.value)))[rows]
    is_signed = got.dtype == torch.bfloat16  # of logits, the cut of the sums is a gain of its own
    measured = measure.bounded(
        value, lambda at: tau[at], taken, is_signed=is_signed, num_blocks=result.num_blocks
    )
    ratio = float(measured.ratio.max())
    verdict = compare.judge_bounded(ratio)
    if is_signed:
        whole, row = measured.z_sums.total(slice(0, len(taken))), float(measured.z_row.max())
        columns = compare.judge_columns(float(measured.z_column.max()), 0)
        verdict = compare.first_failure(compare.judge_bounded(ratio, whole, row), columns)
    if not verdict.passed:
        return None
    return int((~same_bits(taken, value.to(taken.dtype))).sum()), 0, ratio


def _differing(value: Tensor, got: Tensor, rows: Tensor) -> tuple[int, int]:
    """Values whose bits differ, and the largest distance."""
    value, got = value[rows].to(got.dtype), got[rows]
    if not got.is_floating_point():
        return int((value != got).sum()), 0
    differing = ~same_bits(value, got)
    if not differing.any():
        return 0, 0
    return int(differing.sum()), max(1, int(ulp_distance(value, got).max()))


def _value(result: Result, dtype: torch.dtype) -> Tensor:
    if isinstance(result, Bounded):
        return result.value.to(torch.float32).to(dtype)
    return result if isinstance(result, Tensor) else result.value
