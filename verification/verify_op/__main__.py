"""The command `python -m verification.verify_op`: a stranger's operation, every check of it.

Knows the command line and the table. Exit status: 0 every check that was run passed, 1 one failed,
2 the command was wrong, 130 interrupted.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from engine.models import cache_root
from verification.compare import FAIL, NOT_RUN
from verification.interrupts import INTERRUPTED
from verification.report_text import count, plain
from verification.results import Failure
from verification.terminal import WIDTH, standard_console
from verification.verify_op.process import Kernel, KernelError
from verification.verify_op.trial import OPERATIONS, TRAINED, Check, checks

NAME = 47  # columns: the longest name of a check, and a space
TABLE = NAME + 32  # narrower than the narrowest terminal


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The whole command.

    Returns:
        0 if every check that was run passed, 1 if not; wrong use leaves by SystemExit 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m verification.verify_op",
        description="Holds op_<operation> of a shared object to every check of that operation.",
    )
    parser.add_argument("operation", type=_operation, help=", ".join(OPERATIONS))
    parser.add_argument("library", type=_library, help="a shared object with that C function")
    options = parser.parse_args(arguments)
    console = console or standard_console()
    transformers.utils.logging.disable_progress_bar()
    console.print(Text(f"op_{options.operation} of {options.library}"), soft_wrap=True)
    console.print()
    console.print(Text(f"{'check':<{NAME}}{'compared':>9}{'differing':>10}{'ulp':>4}  verdict"))
    console.print(Text("─" * TABLE))
    try:
        with Kernel(options.library.resolve(), options.operation) as kernel:
            found = _run(kernel, console)
    except KernelError as error:
        console.print(Text(f"error: {plain(error)}", style="bold red"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED
    return _verdict(found, console)


def _operation(text: str) -> str:
    if text not in OPERATIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(OPERATIONS)}")
    return text


def _library(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file")
    return Path(text)


def _run(kernel: Kernel, console: Console) -> list[Check]:
    found = []
    with torch.inference_mode():
        for check in checks(kernel, _has_model):
            found.append(check)
            console.print(_line(check))
    return found


def _has_model(name: str) -> bool:
    return name != TRAINED or any(cache_root().glob(f"{TRAINED}-*/config.json"))


def _line(check: Check) -> Text:
    line = Text(f"{check.name:<{NAME}}{count(check.values):>9}")
    differing = "–" if check.differing is None else count(check.differing)
    ulp = "–" if check.max_ulp is None else str(check.max_ulp)
    line.append(f"{differing:>10}{ulp:>4}  ")
    status = check.verdict.status
    style = "bold red" if status == FAIL else "yellow" if status == NOT_RUN else "green"
    line.append(status, style=style)
    return line


def _verdict(found: Sequence[Check], console: Console) -> int:
    failed = [check for check in found if check.verdict.status == FAIL]
    console.print()
    left_out = [check for check in found if check.verdict.status == NOT_RUN]
    width = min(WIDTH, console.width)
    for checks_of, style in ((left_out, "yellow"), (failed, "red")):
        for reason, names in _by_reason(checks_of).items():
            words = f"{'; '.join(names)}: {reason}"
            console.print(Text(textwrap.fill(words, width, subsequent_indent="  "), style=style))
    first = next((check.failure for check in failed if check.failure is not None), None)
    if first is not None:
        console.print(_story(first), width=width)
    num_run = len(found) - len(left_out)
    passed = num_run > 0 and not failed
    words = f"{num_run} checks run, {len(failed)} failed, {len(left_out)} not run"
    style = "bold green" if passed else "bold red"
    console.print(Text(f"{'PASS' if passed else 'FAIL'}  {words}", style=style))
    return 0 if passed else 1


def _by_reason(checks_of: Sequence[Check]) -> dict[str, list[str]]:
    """Why checks are no pass, and for each reason the checks."""
    names: dict[str, list[str]] = {}
    for check in checks_of:
        names.setdefault(plain(check.verdict.reason), []).append(check.name)
    return names


def _story(failure: Failure) -> Panel:
    place = ", ".join(
        f"{name} {getattr(failure, name)}"
        for name in ("token", "head", "channel")
        if getattr(failure, name) is not None
    )
    lines = [
        f"tap {failure.tap}, layer {failure.layer}, {failure.phase}, prompt {failure.prompt}",
        f"in place of {failure.hf_module}: {place}",
        f"got {failure.got}, expected {failure.expected}",
        failure.message,
        failure.diagnosis or "no known wrong variant gives this output",
    ]
    text = Text("\n".join(plain(line) for line in lines))
    return Panel(text, title="first failure", title_align="left", border_style="red")


if __name__ == "__main__":
    sys.exit(main())
