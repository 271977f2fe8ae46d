"""The verdict rules for one operation: when measured numbers are good enough.

Holds the published limits of the grades bits, exact and bounded; knows nothing of models or of how
numbers were measured. Every rule gives a Verdict: pass or fail, with the reason in words. No rule
has an argument that loosens it. Whole models (layers, logits, tokens) are judged in `composition`.
"""

from dataclasses import dataclass

from verification.signed_statistics import MAX_Z_CELL, MAX_Z_COLUMN, MAX_Z_ROW

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"

MAX_INNER_ULP = 1  # of replayed values: explained by one inner rounding, see replay.Explain
MAX_RATIO = 1.0  # |error| / budget


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


def judge_bits(differing: int, num_values: int, other: str) -> Verdict:
    """Grade bits: equal in every element.

    Args:
        other: what the values were compared with, for the reason.
    """
    if differing == 0:
        return PASSED
    return failed(f"{differing} of {num_values} values are not the bits of {other}")


def judge_replayed(differing: int, num_values: int, max_ulp: int, other: str) -> Verdict:
    """Grade exact where an inner rounding is open: it explains every value that differs.

    Args:
        max_ulp: the largest of replay.Explain.
    """
    if max_ulp > MAX_INNER_ULP:
        return failed(
            f"{differing} of {num_values} values differ from {other}, and not only at borders of a "
            "rounding that float32's precision leaves open"
        )
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
