"""Says at the end of a run which tests were left out: a line per reason, not one per test.

On a machine without a GPU more than a thousand tests share a reason.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable

WIDTH = 100
IN_OTHER_WORDS = {
    "Skipping benchmark (--benchmark-skip active).": "benchmarks: make bench runs them",
}


def left_out(reasons: Iterable[str]) -> list[str]:
    """The lines, the most frequent reason first.

    Args:
        reasons: as pytest keeps them, one per skipped test.
    """
    counts = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    lines = []
    for reason, count in counts.most_common():
        words = f"{count:>5}  {IN_OTHER_WORDS.get(reason, reason)}"
        lines += textwrap.wrap(words, WIDTH, subsequent_indent=" " * 7)
    return lines
