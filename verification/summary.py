"""Sums cells up: one row per mode, phase and tap, in the order of the forward pass.

A row fails if any of its cells failed or anything pooled over prompts did; its reason is the first
one's.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from verification.compare import FAIL, NOT_RUN, PASS
from verification.localise import Findings
from verification.passes import ACCUMULATED, DECODE, LOCAL, PREFILL, UNTAPPED
from verification.results import Cell, SummaryRow
from verification.taps import POINT, RESULT_ORDER, operation_of

_PHASES = (PREFILL, DECODE, UNTAPPED, "both")


def summarise(
    cells: Sequence[Cell], findings: Findings, not_run: Mapping[str, str]
) -> list[SummaryRow]:
    """The rows.

    Args:
        not_run: checks that could not be made, and why.
    """
    groups: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.mode, cell.phase, cell.tap].append(cell)
    reasons: dict[tuple[str, str, str], str] = {}
    for finding in findings.ordered():
        key = (finding.mode, finding.phase, finding.tap)
        reasons.setdefault(key, finding.verdict.reason or "failed")
        groups.setdefault(key, [])
    rows = [_row(*key, groups[key], reasons.get(key)) for key in sorted(groups, key=_place)]
    for check, reason in not_run.items():
        rows.append(
            SummaryRow(
                LOCAL, "both", check, operation_of(check).name, "exact",
                0, 0, None, None, None, None, NOT_RUN, reason,
            )
        )  # fmt: skip
    return rows


def _place(key: tuple[str, str, str]) -> tuple[int, int, int]:
    mode, phase, tap = key
    return (mode == ACCUMULATED, RESULT_ORDER.index(tap), _PHASES.index(phase))


def _row(mode: str, phase: str, tap: str, cells: Iterable[Cell], reason: str | None) -> SummaryRow:
    cells = list(cells)
    has_failed = reason is not None or any(cell.status == FAIL for cell in cells)
    grade = cells[0].grade if cells else POINT[tap].grade if tap in POINT else "exact"
    return SummaryRow(
        mode,
        phase,
        tap,
        operation_of(tap).name,
        grade,
        len(cells),
        sum(cell.values for cell in cells),
        _sum(cell.differing for cell in cells),
        _max(cell.max_ulp for cell in cells),
        _max(cell.ratio for cell in cells),
        _max(cell.z for cell in cells),
        FAIL if has_failed else PASS,
        reason,
    )


def _sum(values: Iterable[int | None]) -> int | None:
    present = [value for value in values if value is not None]
    return sum(present) if present else None


def _max(values: Iterable[float | None]):
    return max((value for value in values if value is not None), default=None)
