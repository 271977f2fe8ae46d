"""Finds the value to show for a failed check: its row and channel, what came, what should have.

Knows expected values and passes; decides no verdict.
"""

from dataclasses import replace

import torch
from torch import Tensor

from verification import compare, measure
from verification.expected import Bounded
from verification.measure import Element
from verification.passes import Pass, Segment
from verification.replay import Replayed
from verification.rounding import same_bits
from verification.steps import LOGIT_TAPS
from verification.taps import TapKey


def num_differing(got: Tensor, other: Tensor) -> int:
    """Values whose bits are not the other's."""
    return int((~same_bits(got, other)).sum())


def worst_element(
    expected: Replayed | Bounded, got: Tensor, run: Pass, key: TapKey, rows: slice
) -> Element:
    """The worst of some rows: against truth or, if that holds, what they should repeat."""
    if isinstance(expected, Bounded):
        element = measure.worst_bounded(expected.value, expected.budget(rows), got, rows)
        is_over = not abs(element.got - element.expected) <= (element.budget or 0.0)
    else:
        element = measure.worst_explained(expected, got, rows)
        place = torch.tensor([element.row * got.shape[1] + element.column])
        allowed = 0 if expected.explain is None else compare.MAX_INNER_ULP
        is_over = int(expected.inner_ulps(got, place)) > allowed
    if not is_over:
        for other in (run.reference, run.twin):
            if other is not None and num_differing(got[rows], other[key][rows]):
                return measure.worst_replayed(other[key], got, rows)
    return element


def worst_of_channel(expected: Bounded, got: Tensor, channel: int) -> Element:
    """The value of one channel that is furthest off its budget, over all rows."""
    rows, column = slice(0, len(got)), slice(channel, channel + 1)
    budget = expected.budget(rows)[:, column]
    element = measure.worst_bounded(expected.value[:, column], budget, got[:, column], rows)
    return shifted(element, channel)


def shifted(element: Element, columns: int) -> Element:
    """An element found in a part of the columns, with its place in the whole."""
    return replace(element, column=element.column + columns)


def position_of(run: Pass, tap: str, row: int) -> int:
    """The position, in its prompt, of the token behind a row of a tap."""
    return int(run.positions[run.logit_rows[row] if tap in LOGIT_TAPS else row])


def segment_of(run: Pass, tap: str, row: int) -> Segment:
    """The segment that a row of a tap belongs to."""
    return next(s for s in run.segments if s.rows_of(tap).start <= row < s.rows_of(tap).stop)
