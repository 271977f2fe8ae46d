"""The command `python -m verification.teeth`: the kill matrix, printed and kept as evidence.

Knows the command line and what is printed. Exit status: 0 every goal was reached, 1 not so or the
run itself failed, 2 the command was wrong. A whole run is written to docs/evidence/; one of some
groups only with --record, and then it says which were not run.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from engine.errors import EngineError
from verification.evidence import EVIDENCE, Evidence, this_place, wilson, write
from verification.interrupts import ends_in_one_line
from verification.mutants.build import ROOT
from verification.mutants.catalogue import choose
from verification.mutants.faults import CPU, GPU
from verification.teeth import arena
from verification.teeth.generate import (
    SEED,
    generated,
    load_equivalents,
    load_survivors,
    with_equivalents,
)
from verification.teeth.matrix import Row, Tally, rows_of
from verification.teeth.museum import hang, load_exhibits, own_faults
from verification.teeth.plan import (
    CATALOGUE,
    GENERATED,
    MUSEUM,
    Planted,
    check_plan,
    hand_made,
    of_device,
)
from verification.teeth.report import Controls, record

CACHES = ROOT / "build" / "teeth"
COUNT = {CPU: 300, GPU: 100}  # generated faults of a full run
GROUPS = (CATALOGUE, MUSEUM, GENERATED)


@ends_in_one_line("the answers so far are kept, and the same command goes on from there")
def main(arguments: Sequence[str] | None = None) -> int:
    """The whole command; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m verification.teeth",
        description="Plants faults and runs the whole suite on each; every one must be killed.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="the lane")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    parser.add_argument("--groups", default=",".join(GROUPS), help=", ".join(GROUPS))
    parser.add_argument("--only", metavar="IDS", help="fault ids with commas")
    parser.add_argument("--count", type=int, help="generated faults; 0: one of every line")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing later")
    parser.add_argument("--seed", type=int, default=SEED, help="of the sample")
    parser.add_argument("--record", action="store_true", help="keep a run of some groups too")
    parser.add_argument("--fresh", action="store_true", help="forget the answers of earlier runs")
    options = parser.parse_args(arguments)
    device = GPU if options.device == "cuda" else CPU
    groups = options.groups.split(",")
    if unknown := sorted(set(groups) - set(GROUPS)):
        parser.error(f"no group {unknown[0]!r}")
    count = COUNT[device] if options.count is None else options.count or None
    try:
        planted = whole_plan(ROOT, device, count, options.seed)
        chosen = [each for each in planted if each.group in groups]
        chosen = list(choose(chosen, options.only))
        clock = time.monotonic()
        made, rows = _run(chosen, device, options)
        print_rows(rows)
        print_scores(made)
        print(f"{time.monotonic() - clock:.0f} s on the clock, {options.jobs} faults at a time")
        if options.only is None and (options.record or set(groups) == set(GROUPS)):
            if set(groups) == set(GROUPS):  # it says what the records of its parts said
                for part in EVIDENCE.glob(f"teeth-{device}-*.json"):
                    part.unlink()
            print(f"wrote {write(made).relative_to(ROOT)}; make evidence makes the page of it")
    except (EngineError, OSError) as error:
        print(f"error: {error}")
        return 1
    return 0 if made.passed else 1


def whole_plan(root: Path, device: str, count: int | None, seed: int = SEED) -> list[Planted]:
    """Everything that a full run of a lane plants.

    Raises:
        CatalogueError: something does not apply.
    """
    planted = hang(load_exhibits(), hand_made(root) + own_faults(root))
    planted = of_device(planted, device)
    sample = generated(root, device, count, seed)
    planted += with_equivalents(sample, load_equivalents(), root, device)
    check_plan(planted, root)
    return planted


def _run(
    planted: list[Planted], device: str, options: argparse.Namespace
) -> tuple[Evidence, list[Row]]:
    path = CACHES / f"{device}.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    cache = arena.Cache(path)
    num_problems = 0
    try:
        results = arena.run(
            planted,
            device,
            cache,
            options.jobs,
            report=_progress,
            seconds=options.seconds,
            place=lambda: this_place(_gpu_name() if device == GPU else None),
        )
    except arena.RunError as error:  # what it came to is recorded, and that it met problems
        print(f"error: {error}")
        results, num_problems = error.results, error.num_problems
    equivalents = load_equivalents()
    tried = {result.id for result in results}
    left_out = [each for each in planted if each.id not in tried]
    planted = [each for each in planted if each.id in tried]
    needs = {each.edit: each.needs for each in load_survivors()}
    rows = rows_of(planted, results, [each.edit for each in equivalents], needs)
    controls = {answer.label for result in results for answer in result.answers}
    found_at = dict.fromkeys(answer.place for each in results for answer in each.answers)
    places = [cache.get(place) for place in found_at if place]
    # Of all answers, those of earlier runs too, whatever the clock of this run says.
    seconds = sum(answer.seconds for result in results for answer in result.answers)
    controls = Controls(len(controls), num_problems)
    sample = "" if options.count is None else f"--count {options.count}"
    sample += "" if options.seed == SEED else f" --seed {options.seed}"
    made = record(
        rows,
        load_exhibits(),
        equivalents,
        controls,
        device,
        seconds,
        places,
        left_out,
        sample.strip(),
    )
    return made, rows


def print_rows(rows: Sequence[Row]) -> None:
    """What went wrong, a line each."""
    misnamed = Tally(tuple(row for row in rows if row.planted.group != GENERATED)).misnamed
    for row in rows:
        each = row.planted
        if row.is_equivalent and row.killer is not None:
            print(f"no equivalent: {each.id}: {each.fault}: {row.killer.by}")
        elif row.is_planted and not row.is_equivalent and not row.is_killed:
            print(f"survivor: {each.id}: {each.fault}")
        elif row in misnamed:
            killer = row.killer
            print(f"misnamed: {each.id}: {killer.label} {killer.by} {killer.named or killer.why}")
        if row.is_false_alarm:
            print(f"false alarm: {each.id} is legal")


def print_scores(made: Evidence) -> None:
    """Each count with its interval."""
    for score in made.scores:
        low, high = wilson(score.hits, score.total) if score.total else (0.0, 1.0)
        share = (
            f"{score.hits} of {score.total}, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        )
        print(f"{'ok  ' if score.passed else 'FAIL'} {score.what}: {share}")
    print(f"{'PASS' if made.passed else 'FAIL'}: {made.seconds:.0f} s of answers")


def _progress(done: int, total: int, what: str) -> None:
    if what.startswith(arena.PROBLEM):
        print(what, flush=True)
    elif sys.stdout.isatty():
        print(f"\r{done} of {total}: {what[:60]:60}", end="" if done < total else "\n", flush=True)
    elif done % 20 == 0 or done == total:
        print(f"{done} of {total}", flush=True)


def _gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
