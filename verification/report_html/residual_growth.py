"""Residual growth: how the error of the residual stream grows, the engine's beside the yardstick's.

Knows one number per layer and line; the scale is logarithmic, so equal slopes are equal growth.
"""

import math

from verification.report_html.markup import escape, line, svg, text
from verification.report_text import ratio

LEFT, RIGHT, TOP, BOTTOM = 76, 1020, 22, 214
LINES = (("yardstick", "transformers in bf16"), ("engine", "engine"))


def residual_growth(results: dict) -> str:
    """Two lines over the layers; no point where a value is zero: it has no logarithm."""
    growth = results["residual_growth"]
    layers = growth["layers"]
    values = [v for name, _ in LINES for v in growth[name] if _is_drawable(v)]
    if not values:
        return "<p class='empty'>The residual stream was not compared.</p>"
    low, high = _decades(min(values), max(values))

    def x_of(index: int) -> float:
        return LEFT + (RIGHT - LEFT) * (index / (len(layers) - 1) if len(layers) > 1 else 0.5)

    def y_of(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log10(value) - low) / (high - low)

    body = []
    for tick in _ticks(low, high):
        body.append(line(LEFT, y_of(tick), RIGHT, y_of(tick), "grid"))
        body.append(text(LEFT - 8, y_of(tick) + 4, f"{tick:g}", "end small dim"))
    step = max(1, round(len(layers) / 15))
    for index, layer in enumerate(layers):
        if index % step == 0 or len(layers) == 1:
            body.append(text(x_of(index), BOTTOM + 18, layer, "mid small dim"))
    body.append(text(RIGHT, BOTTOM + 34, "layer →", "end small dim"))
    for name, _ in LINES:
        points = [(x_of(i), y_of(v), v) for i, v in enumerate(growth[name]) if _is_drawable(v)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in points)
        body.append(f'<path d="{path}" class="line-{name}"/>')
        if name == "engine":
            body += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="dot"><title>'
                f"{escape(_title(growth, i))}</title></circle>"
                for i, v in enumerate(growth[name])
                if _is_drawable(v)
                for x, y in [(x_of(i), y_of(v))]
            ]
    for index, (name, label) in enumerate(reversed(LINES)):
        x = LEFT + 12 + 110 * index
        body.append(line(x, 10, x + 26, 10, f"line-{name}"))
        body.append(text(x + 34, 14, label, "small"))
    return svg(1040, BOTTOM + 40, "relative error of the residual stream by layer", body)


def _title(growth: dict, index: int) -> str:
    ours, theirs = growth["engine"][index], growth["yardstick"][index]
    quotient = ratio(ours / theirs) if theirs else "–"
    return (
        f"layer {growth['layers'][index]}: engine {ours:.3g}, yardstick {theirs or 0:.3g}, "
        f"{quotient} ×"
    )


def _is_drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _decades(low: float, high: float) -> tuple[float, float]:
    """Ends of the scale in decades, with a little air, at least a third of a decade apart."""
    bottom, top = math.log10(low) - 0.06, math.log10(high) + 0.06
    middle = (bottom + top) / 2
    return min(bottom, middle - 0.17), max(top, middle + 0.17)


def _ticks(low: float, high: float) -> list[float]:
    steps = (1,) if high - low > 4 else (1, 2, 5)
    return [
        step * 10.0**decade
        for decade in range(math.floor(low), math.ceil(high) + 1)
        for step in steps
        if low <= math.log10(step) + decade <= high
    ]
