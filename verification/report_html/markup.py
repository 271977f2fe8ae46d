"""Escaping and the few SVG shapes that the figures share.

Knows HTML and SVG; knows nothing of results.
"""

import html
import re

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def escape(value: object) -> str:
    """Text that is safe between tags and inside quoted attributes; control characters become �."""
    return html.escape(_CONTROL.sub("�", str(value)), quote=True)


def svg(width: float, height: float, label: str, body: list[str]) -> str:
    """A figure that scales with the page.

    Args:
        width, height: size of the drawing's own coordinates.
        label: what the figure shows, for those who cannot see it.
    """
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
        + "".join(body)
        + "</svg>"
    )


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "") -> str:
    """A rectangle; the title shows when the pointer rests on it."""
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{css}"'
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def text(x: float, y: float, content: object, css: str = "") -> str:
    """Text with its baseline at y; css classes `end` and `mid` set where x is."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{escape(content)}</text>'
