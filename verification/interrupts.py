"""Ctrl-C in a command that runs for minutes: one line, and the status that shells expect.

Knows nothing of what was interrupted; each command says in its own words what is left of its run.
"""

import functools
from collections.abc import Callable

INTERRUPTED = 128 + 2  # as shells report a process that SIGINT ended

Command = Callable[..., int]


def ends_in_one_line(words: str) -> Callable[[Command], Command]:
    """A command that prints `words` where it is interrupted and returns INTERRUPTED."""

    def decorated(main: Command) -> Command:
        @functools.wraps(main)
        def guarded(*arguments: object, **named: object) -> int:
            try:
                return main(*arguments, **named)
            except KeyboardInterrupt:
                print(f"\ninterrupted: {words}")
                return INTERRUPTED

        return guarded

    return decorated
