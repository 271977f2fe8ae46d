"""The command line: `python -m engine generate --model NAME "a prompt"`, and `bench`.

Decides what goes to stderr (progress, errors) and the exit code: 0 done, 1 the engine refused or
failed, 2 wrong use, 130 interrupted. What the subcommands do is their own modules'.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from engine.bench_command import add_bench_parser, run_bench
from engine.errors import EngineError
from engine.generate_command import RunnerFactory, add_generate_parser, run_generate
from engine.standard_streams import open_closed_streams

EXIT_ENGINE_ERROR = 1
EXIT_INTERRUPTED = 130


class ProgressBar:
    """Shows long preparations on stderr while they last; silent where stderr is no terminal."""

    def __init__(self) -> None:
        """Prepare; nothing is shown before the first report."""
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def report(self, what: str, done: int, total: int) -> None:
        """Say how far a piece of work is; units are the caller's, a total of 0 is not known."""
        if what not in self._tasks:
            self._progress.start()
            self._tasks[what] = self._progress.add_task(what, total=total or None)
        self._progress.update(self._tasks[what], completed=done, total=total or None)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def main(arguments: Sequence[str] | None = None, make_runner: RunnerFactory | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: those of the process.
        make_runner: what runs the model; None: `ModelRunner`.

    Returns:
        The exit code. Wrong use leaves through SystemExit(2), as argparse does.
    """
    open_closed_streams()
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters of the answer
    bar = ProgressBar()
    try:
        if options.command == "bench":
            run_bench(options, bar.report)
        else:
            run_generate(options, make_runner, bar.report, bar.close)
        sys.stdout.flush()  # here, where a reader that has gone is an error like any other
    except BrokenPipeError:
        # The reader has gone; the interpreter must not complain about it when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ENGINE_ERROR
    except (EngineError, OSError, MemoryError) as error:
        bar.close()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return EXIT_ENGINE_ERROR
    except KeyboardInterrupt:
        bar.close()
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        bar.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine", description="Run Llama models.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_generate_parser(commands)
    add_bench_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
