"""Standard output and the progress of a run on it, for every command.

Decides how wide output is, what becomes of characters that a terminal's encoding lacks, and how
often progress is told. Knows nothing of what is run.
"""

import codecs
import io
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine.standard_streams import open_closed_streams
from verification.report_text import plain

WIDTH = 100  # columns where there is no terminal; the table of verdicts fills exactly these
ASCII = {"─": "-", "–": "-", "÷": "/", "×": "x", "…": "..."}
SECONDS_BETWEEN_LINES = 10.0  # without a terminal: one line of progress at most so often


def standard_console() -> Console:
    """Standard output: as wide as its terminal, or WIDTH; what its encoding lacks in ASCII."""
    open_closed_streams()
    codecs.register_error("touchstone-ascii", _in_ascii)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="touchstone-ascii")
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """The nearest ASCII of what a terminal's encoding does not have."""
    assert isinstance(error, UnicodeEncodeError), "only writing is told to use this"
    lacking = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in lacking), error.end


class ProgressReport:
    """Progress of a run: a bar on a terminal, a line now and then elsewhere.

    Call it with (done, total, what); it is a context manager.
    """

    def __init__(self, console: Console) -> None:
        """Args: console: where to show; its is_terminal decides between bar and lines."""
        self._console = console
        self._bar: Progress | None = None
        self._task = None
        self._next_line = 0.0
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<32.32}", markup=False),
                BarColumn(bar_width=36, complete_style="cyan", finished_style="cyan"),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )

    def __enter__(self) -> "ProgressReport":
        """Starts the bar."""
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("loading", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the bar away, so that the table follows on a clean screen."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Shows that `done` of `total` steps are done and `what` is under way; 0: not known."""
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, total=total or None, description=plain(what)
            )
        elif (now := time.monotonic()) >= self._next_line or done == total > 0:
            self._next_line = now + SECONDS_BETWEEN_LINES
            share = f"{done:>5}/{total}" if total else ""
            self._console.print(f"{share}  {plain(what)}", markup=False, highlight=False)
