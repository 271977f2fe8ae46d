"""The command `python -m verification`: one run, one table, verify.json and verify.html.

Knows the command line and where files go; knows nothing of how anything is verified. Exit status: 0
the verdict is pass, 1 it is not or something refused, 2 the command was wrong, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from engine.config import ModelConfig
from engine.errors import EngineError, InvalidArgument
from engine.models import model_names, name_of, resolve
from verification.evidence_page import load_all
from verification.interrupts import INTERRUPTED
from verification.prompts import default_selection, names_prompts, prompts_for
from verification.report_files import ReportUnwritten, json_text, write_whole
from verification.report_html import render
from verification.report_terminal import print_report
from verification.report_text import plain
from verification.selection import GRADES, Selection
from verification.taps import OPERATIONS, RESULT_ORDER
from verification.terminal import ProgressReport, standard_console

DEFAULT_MODEL = "smollm2-135m"
DEVICES = ("cpu", "cuda")
GUIDE = "docs/reading-the-verdict.md"
MAX_LAYER = 9999  # of any model; a range is written out before the model is known


def build_parser() -> argparse.ArgumentParser:
    """The command line; a wrong word is refused with the option's name and its legal values."""
    parser = argparse.ArgumentParser(
        prog="python -m verification",
        description="Compares every operator of every layer with Hugging Face transformers.",
    )
    add = parser.add_argument
    add(
        "--model",
        default=DEFAULT_MODEL,
        type=_model,
        help=f"{', '.join(model_names())}, a directory or a hub id (default: %(default)s)",
    )
    add("--device", default="cpu", choices=DEVICES, help="where the engine runs (default: cpu)")
    add("--prompts", metavar="IDS", help="all, quick, or prompt ids with commas")
    add("--taps", metavar="TAPS", type=_names(RESULT_ORDER), help=", ".join(RESULT_ORDER))
    add("--layers", metavar="LAYERS", type=parse_layers, help="for example 0,3-5")
    add("--op", metavar="OPS", type=_names(OPERATIONS), help=", ".join(OPERATIONS))
    add("--grade", metavar="GRADES", type=_names(GRADES), help=", ".join(GRADES))
    add("--html", type=_file, default=Path("verify.html"), help="default: %(default)s")
    add("--json", type=_file, default=Path("verify.json"), help="default: %(default)s")
    return parser


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers from "0,3-5", ascending, each once."""
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(
                f"{part.strip()!r} is no layer; legal: numbers and ranges, such as 0,3-5"
            )
        if dash and int(last) < int(first):
            raise argparse.ArgumentTypeError(f"range {part.strip()!r} ends before it begins")
        if int(last or first) > MAX_LAYER:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is beyond layer {MAX_LAYER}")
        layers.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(layers))


def _names(legal: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of names with commas between, each one of `legal`."""

    def parse(text: str) -> tuple[str, ...]:
        words = tuple(word.strip() for word in text.split(","))
        for word in words:
            if word not in legal:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(legal)}")
        return words

    return parse


def _model(text: str) -> str:
    """A name that could be a model; whether a path or hub id holds one shows later."""
    if text not in model_names() and "/" not in text and not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(model_names())}, no directory and no hub id org/name"
        )
    return text


def _file(text: str) -> Path:
    """A place to write to: found missing after the run, it would cost the whole run."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in a directory that exists")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is in a directory that cannot be written to")
    return path


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The whole command.

    Returns:
        0 if the verdict is pass, 1 if it is not or something refused, 130 if interrupted. Wrong
        use raises SystemExit(2).
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    console = console or standard_console()
    try:
        evidence = load_all()
        results = run(parser, options, console)
        # Before the table: whoever reads that may leave in the middle of it.
        unwritten = _unwritten(
            {options.json: json_text(results), options.html: render(results, evidence)}
        )
        print_report(results, console)
        for error in unwritten:
            console.print(Text(f"error: {plain(error)}"), soft_wrap=True)
        if unwritten:
            return 1
        where = f"  {options.json}, {options.html}; how to read them: {GUIDE}"
        console.print(Text(where), soft_wrap=True)
    except (EngineError, OSError) as error:
        return _refused(f"error: {plain(error)}", console)
    except KeyboardInterrupt:
        console.print("interrupted: no verdict")
        return INTERRUPTED
    return 0 if results["verdict"] == "pass" else 1


def _unwritten(reports: dict[Path, str]) -> list[ReportUnwritten]:
    """Writes each report; those that could not be."""
    errors = []
    for path, text in reports.items():
        try:
            write_whole(path, text)
        except ReportUnwritten as error:
            errors.append(error)
    return errors


def _refused(words: str, console: Console) -> int:
    """Says why there is no verdict, where anything can still be written; exit status 1."""
    try:
        console.print(Text(words), soft_wrap=True)
    except OSError:  # it may be standard output that is full
        print(words, file=sys.stderr)
    return 1


def run(parser: argparse.ArgumentParser, options: argparse.Namespace, console: Console) -> dict:
    """Verifies as the command line says; verify.json as a dict."""
    with ProgressReport(console) as progress:
        directory = resolve(
            options.model,
            lambda what, done, total: progress(done >> 20, total >> 20, what),  # MB, not bytes
        )
        config = ModelConfig.from_directory(directory)
        _check_layers(parser, options.layers, config.num_layers)
        name = name_of(options.model)
        wanted = options.prompts or default_selection(name)
        try:
            prompts = prompts_for(name, directory, config.vocab_size, wanted)
        except InvalidArgument as error:
            parser.error(f"argument --prompts: {error}")
        selection = Selection(*map(_set, (options.taps, options.layers, options.op, options.grade)))
        if selection.is_empty(config.num_layers):
            parser.error("--taps, --layers, --op and --grade together leave nothing to check")
        # Not at the top: torch takes seconds to load, and a wrong word is refused without it.
        from verification.verify_model import verify_model

        return verify_model(
            options.model,
            directory,
            prompts,
            options.device,
            selection,
            progress,
            may_leave_out=not names_prompts(options.prompts),
        )


def _check_layers(
    parser: argparse.ArgumentParser, layers: tuple[int, ...] | None, num_layers: int
) -> None:
    if layers and layers[-1] >= num_layers:
        last = num_layers - 1
        parser.error(f"argument --layers: no layer {layers[-1]}; this model has 0 to {last}")


def _set(names: tuple | None) -> frozenset | None:
    return None if names is None else frozenset(names)


if __name__ == "__main__":
    sys.exit(main())
