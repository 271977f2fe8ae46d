"""The command `python -m verification.mutants`: plants every fault and prints what found it.

Knows the command line and the table. Exit status: 0 every fault was found and named and nothing
correct was failed, 1 not so or something refused, 2 the command was wrong, 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.errors import EngineError
from verification.interrupts import ends_in_one_line
from verification.mutants.catalogue import CATALOGUE_PATH, VERIFY, choose, load_catalogue
from verification.mutants.trial import Outcome, Trial, run
from verification.oracle import OracleError
from verification.terminal import WIDTH


@ends_in_one_line("nothing was written")
def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The whole command.

    Returns:
        0 if the trial passed, 1 if not; wrong use leaves by SystemExit 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m verification.mutants",
        description="Plants one-line faults in the CPU twin; the suite must find and name each.",
    )
    parser.add_argument("--only", metavar="IDS", help="mutant ids with commas; all by default")
    parser.add_argument("--catalogue", type=Path, default=CATALOGUE_PATH, help="another catalogue")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        mutants = choose(load_catalogue(options.catalogue), options.only)
        with console.status("") as status:
            done = 0

            def report(outcome: Outcome) -> None:
                nonlocal done
                done += 1
                status.update(f"{done} of {len(mutants)}: {outcome.mutant.id}")

            trial = run(mutants, report)
    except (EngineError, OracleError, OSError) as error:
        console.print(Text(f"error: {error}"), soft_wrap=True)
        return 1
    print_trial(trial, console)
    if options.json is not None:
        text = json.dumps(trial.to_json(), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if trial.passed else 1


def print_trial(trial: Trial, console: Console) -> None:
    """The table, what went wrong, and the summary line."""
    table = Table(title="planted faults", title_justify="left")
    for column in ("fault", "what it does", "found by", "named", "s"):
        right, whole = column == "s", column == "fault"
        table.add_column(
            column, justify="right" if right else "left", overflow="fold", no_wrap=whole
        )
    for outcome in trial.outcomes:
        table.add_row(*_cells(outcome))
    console.print(table)
    for (model, prompts), named in trial.control.items():
        if named is not None:
            console.print(Text(f"false alarm: unmutated, {model}, {prompts}: {_words(named)}"))
    for outcome in trial.outcomes:
        for line in _complaints(outcome):
            console.print(Text(line), soft_wrap=True)
    console.print(Text(trial.summary, style="bold green" if trial.passed else "bold red"))


def _cells(outcome: Outcome) -> tuple[str | Text, ...]:
    mutant, first = outcome.mutant, outcome.first
    if first is None:
        found, named = Text("not found", style="bold red"), Text("-")
    else:
        found = Text(first.grade)
        place = f"{first.operator} ({first.tap}, layer {first.layer})"
        named = Text(place, style="" if outcome.is_named else "bold red")
    return (
        mutant.id,
        Text(mutant.fault),
        found,
        named,
        f"{outcome.seconds:.1f}",
    )


def _complaints(outcome: Outcome) -> list[str]:
    mutant, lines = outcome.mutant, []
    if not outcome.is_found and mutant.found_by == VERIFY:
        bits = "no bit differs" if outcome.bits is None else f"bits: {_words(outcome.bits)}"
        lines.append(f"survivor: {mutant.id} on {mutant.model}, {mutant.prompts}; {bits}")
    elif not outcome.is_found:
        lines.append(f"survivor: {mutant.id} on {mutant.model}, {mutant.prompts}: no bit differs")
    elif not outcome.is_named:
        expected = f"{mutant.operator} ({mutant.tap}, layer {mutant.layer})"
        lines.append(f"misnamed: {mutant.id}: expected {expected}, got {_words(outcome.first)}")
    if outcome.is_false_alarm:
        lines.append(f"false alarm: {mutant.id} is legal: {_words(outcome.verified)}")
    return lines


def _words(named) -> str:
    return f"{named.operator} ({named.tap}, layer {named.layer}), {named.grade}: {named.message}"


if __name__ == "__main__":
    sys.exit(main())
