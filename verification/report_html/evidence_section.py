"""The suite's own record: what it finds when faults are planted, where it points, false alarms.

Knows records of evidence; every cell is escaped here. A matrix of marks is coloured: killed is
deep, alive pale, so a hole in a row shows.
"""

from collections.abc import Sequence

from verification.evidence import Evidence, Score, Table, wilson
from verification.report_html.markup import escape

MARKS = ("killed", "alive")
MOST_ROWS = 400  # of one table on the page; the record has all


def evidence_section(records: Sequence[Evidence]) -> str:
    """Scores of every record, then its tables, folded."""
    if not records:
        return "<p class='empty'>Nothing was recorded.</p>"
    head = (
        "<tr><th></th><th>counted</th><th class='n'>result</th><th class='n'>95 % interval</th>"
        "<th>goal</th></tr>"
    )
    rows = "".join(_score(record, score) for record in records for score in record.scores)
    tables = "".join(_table(record, table) for record in records for table in record.tables)
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>{tables}"


def _score(record: Evidence, score: Score) -> str:
    has_goal = score.at_least is not None or score.at_most is not None
    badge = "<span class='badge open'>no goal</span>"
    if has_goal:
        css, word = ("ok", "reached") if score.passed else ("bad", "missed")
        badge = f"<span class='badge {css}'>{word}</span>"
    interval = "–"
    if score.total:
        low, high = wilson(score.hits, score.total)
        interval = f"{100 * low:.1f} to {100 * high:.1f} %"
    return (
        f"<tr><th>{escape(record.title)}</th><td>{escape(score.what)}</td>"
        f"<td class='n'>{score.hits} of {score.total}</td><td class='n'>{interval}</td>"
        f"<td>{badge}</td></tr>"
    )


def _table(record: Evidence, table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows[:MOST_ROWS])
    left_out = len(table.rows) - MOST_ROWS
    note = f" {left_out} more rows are in the record." if left_out > 0 else ""
    return (
        f"<details><summary>{escape(record.title)}: {escape(table.title)} "
        f"({len(table.rows)})</summary><p class='caption'>{escape(table.note)}{note}</p>"
        f"<table class='matrix'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        "</details>"
    )


def _cell(value: object) -> str:
    if value in MARKS:
        return f"<td class='mark {value}'>{value}</td>"
    if value is None:
        return "<td class='dim'>–</td>"
    if isinstance(value, int | float):
        return f"<td class='n'>{value:.4g}</td>" if isinstance(value, float) else _number(value)
    return f"<td>{escape(value)}</td>"


def _number(value: int) -> str:
    return f"<td class='n'>{value}</td>"
