"""The ULP histogram: for each tap, how many values are how many units in the last place away.

Knows counts; bars are logarithmic, because the one value in a million that differs is what one
looks for.
"""

import math

from verification.report_html.markup import line, rect, svg, text
from verification.report_text import count, forward_order

BUCKETS = ("equal", "1 ULP", "2", "3–4", "more")
LABELS = 108
COLUMN = 184
BAR = 116
ROW = 17


def ulp_histogram(results: dict) -> str:
    """One row per tap, one column per distance."""
    counts = results["ulp_histogram"]
    if not counts:
        return "<p class='empty'>No values were compared.</p>"
    known = forward_order(results["summary"])
    taps = sorted(counts, key=lambda tap: known.index(tap) if tap in known else len(known))
    most = max(max(row) for row in counts.values())
    body = [
        text(LABELS + COLUMN * column, 14, name, "strong") for column, name in enumerate(BUCKETS)
    ]
    for row, tap in enumerate(taps):
        y = 24 + ROW * row
        body.append(text(LABELS - 8, y + ROW * 0.72, tap, "end small"))
        total = sum(counts[tap])
        for column, number in enumerate(counts[tap]):
            x = LABELS + COLUMN * column
            width = BAR * math.log1p(number) / math.log1p(most) if number else 0
            css = "bar-equal" if column == 0 else f"bar-{column}"
            title = f"{tap}: {number} of {total} values, {BUCKETS[column]}"
            body.append(line(x, y + 1, x, y + ROW - 3, "axis"))
            if number:
                body.append(rect(x, y + 2, max(width, 1.5), ROW - 6, css, title))
            body.append(
                text(x + width + 6, y + ROW * 0.72, _share(number, total, column), "small dim")
            )
    return svg(1040, 28 + ROW * len(taps), "distances in ULP by tap", body)


def _share(number: int, total: int, column: int) -> str:
    if not number:
        return "0"
    if column:
        return count(number)
    return "all" if number == total else f"{math.floor(number / total * 1e5) / 1e3:.3f} %"
