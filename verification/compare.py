"""The verdict rules for one operation: when measured numbers are good enough.

Holds the published limits of the grades bits, exact and bounded; knows nothing of models or of how
numbers were measured. Every rule gives a Verdict: pass or fail, with the reason in words. No rule
has an argument that loosens it. Whole models (layers, logits, tokens) are judged in `composition`.
"""

import math
from dataclasses import dataclass

from verification.signed_statistics import MAX_Z_CELL, MAX_Z_COLUMN, MAX_Z_ROW

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"

# Share of replayed values that may fall to the other side of an inner rounding,
MAX_DIFFERING = 1e-3
MAX_INNER_ULP = 1  # and how far, at that rounding
MAX_RATIO = 1.0  # |error| / budget

# Correct engines differ from the replay in at most 3 of 10,000 values (measured; verification notes
# 2.2). A small cell is allowed what chance gives at that rate, so that two values of one row are no
# verdict.
USUAL_DIFFERING = 3e-4
_CHANCE = 1e-6


@dataclass(frozen=True)
class Verdict:
    """pass, fail or not run, and why if it is not pass."""

    status: str
    reason: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it is a pass; not run is none."""
        return self.status == PASS


PASSED = Verdict(PASS)


def failed(reason: str) -> Verdict:
    """A failure in words."""
    return Verdict(FAIL, reason)


def allowed_differing(num_values: int) -> int:
    """How many replayed values may differ: 1 in 1000, or chance's share of a small number."""
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


def judge_bits(differing: int, num_values: int, other: str) -> Verdict:
    """Grade bits: equal in every element.

    Args:
        other: what the values were compared with, for the reason.
    """
    if differing == 0:
        return PASSED
    return failed(f"{differing} of {num_values} values are not the bits of {other}")


def judge_replayed(differing: int, num_values: int, max_ulp: int, other: str) -> Verdict:
    """Grade exact where an inner rounding is open: few differ, by one ULP of that rounding."""
    if max_ulp > MAX_INNER_ULP:
        return failed(
            f"a value is {_ulps(max_ulp)} from {other} at the inner rounding, 1 is allowed; "
            f"{differing} of {num_values} differ"
        )
    allowed = allowed_differing(num_values)
    if differing > allowed:
        return failed(f"{differing} of {num_values} values differ from {other}, {allowed} may")
    return PASSED


def judge_bounded(ratio: float, z_cell: float | None = None, z_row: float | None = None) -> Verdict:
    """Grade bounded: every error within its budget, and no direction to the errors.

    Args:
        ratio: largest |error| / budget.
        z_cell, z_row: largest |z| of the cell and of any of its rows, where they are taken.
    """
    if not ratio <= MAX_RATIO:
        return failed(f"an error is {ratio:.4g} times its budget")
    if z_cell is not None and not z_cell <= MAX_Z_CELL:
        return failed(f"errors point one way: z is {z_cell:.1f}, {MAX_Z_CELL:.0f} is allowed")
    if z_row is not None and not z_row <= MAX_Z_ROW:
        return failed(
            f"the errors of a token point one way: z is {z_row:.1f}, {MAX_Z_ROW:.0f} is allowed"
        )
    return PASSED


def judge_columns(z_column: float, channel: int) -> Verdict:
    """The signed statistics of each channel over all tokens graded together."""
    if z_column <= MAX_Z_COLUMN:
        return PASSED
    return failed(
        f"the errors of channel {channel} point one way: z is {z_column:.1f}, "
        f"{MAX_Z_COLUMN:.0f} is allowed"
    )


def first_failure(*verdicts: Verdict) -> Verdict:
    """The first of some verdicts that is not a pass, or a pass."""
    return next((verdict for verdict in verdicts if not verdict.passed), PASSED)


def _ulps(count: int) -> str:
    return f"{count} ULP" if count < 2**31 - 1 else "NaN, which is infinitely far"
