"""When Ctrl-C is heard: not in the middle of a change, and as one line where nobody listens.

Knows signals; knows nothing of what is changed or left undone.
"""

import signal
import sys
import threading
from types import FrameType, TracebackType


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


class Uninterrupted:
    """A change that is made whole: a KeyboardInterrupt that comes within waits for its end.

    A second Ctrl-C does not wait. Only the main thread is ever interrupted, and only a handler that
    would raise is held back: a program with its own keeps it. Nested, the outermost counts.
    """

    def __enter__(self) -> None:
        self._handler = None
        self._was_interrupted = False
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *exception: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._was_interrupted:
                raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._was_interrupted:
            signal.default_int_handler(number, frame)
        self._was_interrupted = True
