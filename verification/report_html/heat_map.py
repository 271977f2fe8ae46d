"""The heat map: error ÷ budget of every tap in every layer, the worst over prompts and phases.

Knows cells; knows nothing of how they were judged. A failed cell is told by its status, has its own
colour and a cross, so it needs neither colour vision nor a look at the scale.
"""

import math
from dataclasses import dataclass

from verification.report_html.markup import escape, line, rect, svg, text
from verification.report_text import forward_order, ratio

MODES = (("local", "one operator, reference input"), ("accumulated", "whole model, running free"))
# Upper ends of the shades, halving: one shade per factor of two or four below the budget.
SHADES = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
LABELS = 108  # width kept for the names of the taps
GAP = 44  # between the two maps
WIDTH = 1040
ROW = 18
MAX_SIDE = 56.0  # of a square, for models of few layers
TOP = 28


@dataclass(frozen=True)
class Square:
    """The worst cell of one tap in one layer, and whether any of them failed."""

    cell: dict
    status: str


def heat_map(results: dict) -> str:
    """Both maps, local and accumulated, side by side with one scale."""
    cells = results["cells"]
    if not cells:
        return "<p class='empty'>No tap was compared.</p>"
    taps = [tap for tap in forward_order(results["summary"]) if any(c["tap"] == tap for c in cells)]
    num_layers = 1 + max(cell["layer"] or 0 for cell in cells)
    half = (WIDTH - LABELS - GAP) / 2  # of the width: one map
    side = min(MAX_SIDE, half / num_layers)
    body = [
        text(LABELS - 8, TOP + ROW * row + ROW * 0.72, tap, "end small")
        for row, tap in enumerate(taps)
    ]
    for index, (mode, title) in enumerate(MODES):
        left = LABELS + index * (half + GAP)
        body += _map(cells, mode, title, taps, num_layers, left, side)
    height = TOP + ROW * len(taps) + 36
    return svg(WIDTH, height, "error ÷ budget by layer and tap", body) + _legend()


def worst(cells: list[dict]) -> Square | None:
    """Of a square's cells: a failed one first, then the largest ratio; None if there is none."""
    run = [cell for cell in cells if cell["status"] != "not run"]
    if not run:
        return Square(cells[0], "not run") if cells else None
    failed = [cell for cell in run if cell["status"] == "fail"]
    return Square(max(failed or run, key=_size), "fail" if failed else "pass")


def shade(square: Square) -> str:
    """The CSS class of a square."""
    if square.status != "pass":
        return "heat-fail" if square.status == "fail" else "heat-none"
    value = square.cell["ratio"]
    if value is None or value == 0:
        return "heat-equal" if not square.cell["differing"] else "heat-0"
    return next(
        (f"heat-{i}" for i, top in enumerate(SHADES) if value <= top), f"heat-{len(SHADES)}"
    )


def _map(
    cells: list[dict],
    mode: str,
    title: str,
    taps: list[str],
    num_layers: int,
    left: float,
    side: float,
) -> list[str]:
    by_square: dict[tuple[str, int], list[dict]] = {}
    for cell in cells:
        if cell["mode"] == mode:
            by_square.setdefault((cell["tap"], cell["layer"] or 0), []).append(cell)
    layered = [tap for tap in taps if any(t == tap and layer for t, layer in by_square)]
    last_layered = max((taps.index(tap) for tap in layered), default=-1)
    body = [
        f'<text x="{left:.1f}" y="16"><tspan class="strong">{escape(mode)}</tspan>'
        f'<tspan dx="10" class="small dim">{escape(title)}</tspan></text>'
    ]
    for (tap, layer), group in by_square.items():
        square = worst(group)
        # What follows the layers stands under the last one, what precedes them over the first.
        after = num_layers > 1 and tap not in layered and taps.index(tap) > last_layered >= 0
        x = left + side * (num_layers - 1 if after else layer)
        y = TOP + ROW * taps.index(tap)
        body.append(rect(x, y, side - 1, ROW - 1, shade(square), _title(tap, mode, square)))
        if square.status == "fail":
            inset = min(side, ROW) * 0.3
            mid_x, mid_y = x + (side - 1) / 2, y + (ROW - 1) / 2
            near, far = mid_y - inset / 1.4, mid_y + inset / 1.4
            body.append(line(mid_x - inset / 1.4, near, mid_x + inset / 1.4, far, "cross"))
            body.append(line(mid_x - inset / 1.4, far, mid_x + inset / 1.4, near, "cross"))
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * side >= 22 or s == 100)
    foot = TOP + ROW * len(taps) + 14
    body += [
        text(left + side * (layer + 0.5) - 0.5, foot, layer, "mid small dim")
        for layer in range(0, num_layers, step)
    ]
    body.append(text(left + side * num_layers - 1, foot + 16, "layer →", "end small dim"))
    return body


def _title(tap: str, mode: str, square: Square) -> str:
    cell = square.cell
    if square.status == "not run":
        return f"{tap}, layer {cell['layer']}, {mode}: not run"
    differing = "–" if cell["differing"] is None else cell["differing"]
    return (
        f"{tap}, layer {cell['layer']}, {mode} {cell['phase']}: "
        f"error ÷ budget {ratio(cell['ratio'])}, {differing} of {cell['values']} differ, "
        f"prompt {cell['prompt']}: {square.status}"
    )


def _size(cell: dict) -> float:
    """NaN is the worst of all; a cell without a ratio is the mildest."""
    value = cell["ratio"]
    return -1.0 if value is None else math.inf if math.isnan(value) else value


def _legend() -> str:
    names = ("no difference", *(f"≤ {_fraction(top)}" for top in SHADES), "failed", "not run")
    css = ("heat-equal", *(f"heat-{i}" for i in range(len(SHADES))), "heat-fail", "heat-none")
    items = [
        f'<span><svg viewBox="0 0 14 14" class="key">{rect(0.5, 0.5, 13, 13, c)}'
        + ('<path d="M4 4L10 10M10 4L4 10" class="cross"/>' if c == "heat-fail" else "")
        + f"</svg>{escape(name)}</span>"
        for name, c in zip(names, css, strict=True)
    ]
    return f'<p class="legend"><b>error ÷ budget</b>{"".join(items)}</p>'


def _fraction(value: float) -> str:
    return "1" if value == 1 else f"1/{round(1 / value)}"
