"""Draws a verification as one HTML page that needs nothing else: no script, no font, no address.

Knows verify.json; knows nothing of models or tolerances, and decides no verdict. One file per
figure; `page` puts them together. Invariant: every string of the results passes through
`markup.escape`.
"""

from collections.abc import Sequence
from pathlib import Path

from verification.evidence import Evidence
from verification.report_html.page import render

__all__ = ["render", "write_html"]


def write_html(results: dict, path: Path, evidence: Sequence[Evidence] = ()) -> None:
    """Writes the page of one run.

    Args:
        results: verify.json as a dict.
        path: the file; an old one is replaced.
        evidence: what is recorded of the suite itself.
    """
    path.write_text(render(results, evidence), encoding="utf-8")
