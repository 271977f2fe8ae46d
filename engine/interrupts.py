"""Ctrl-C while a command is still being imported: one line, not a traceback.

Once a command runs, it says itself what is left of its work.
"""

import sys
from types import TracebackType


def tell_in_one_line() -> None:
    """Let the interpreter say "interrupted" where nobody catches a KeyboardInterrupt."""
    otherwise = sys.excepthook

    def told(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            otherwise(kind, error, traceback)

    sys.excepthook = told
