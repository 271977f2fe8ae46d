"""Draws a verification as one HTML page that needs nothing else: no script, no font, no address.

Knows verify.json; knows nothing of models or tolerances, and decides no verdict. One file per
figure; `page` puts them together. Invariant: every string of the results passes through
`markup.escape`.
"""

from verification.report_html.page import render

__all__ = ["render"]
