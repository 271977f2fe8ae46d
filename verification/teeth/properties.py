"""Which planted faults the metamorphic properties find, and which only one of them finds.

`python -m verification.teeth.properties` plants faults made by hand, asks every property that
docs/properties.md lists of each, writes the record docs/evidence/metamorphic.json and the page's
last section. Knows the page and what a property is asked; knows nothing of how trees are built.
A property's tests are the page's, the first cases of each: a fault costs all of them.
"""

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from engine.errors import EngineError
from verification import evidence
from verification.interrupts import ends_in_one_line
from verification.mutants.build import ROOT
from verification.mutants.faults import CPU
from verification.teeth import arena
from verification.teeth.arena import KILLED
from verification.teeth.checks import PROPERTIES, Check
from verification.teeth.generate import SEED
from verification.teeth.museum import hang, load_exhibits, own_faults
from verification.teeth.plan import Planted, check_plan, hand_made, of_device

PAGE = ROOT / "docs" / "properties.md"
NAME = "metamorphic"
ROW = re.compile(r"^\| (A?\d[\d, ]*) \| (.+?) \| [BT] \| (.+) \|$", re.M)
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")
BEGIN = "<!-- below: made by make properties -->\n"
SOURCES = ("csrc/", *(f"engine/{n}.py" for n in ("batch", "block_manager", "running_batch")))
SOURCES += tuple(f"engine/{n}.py" for n in ("sampling", "scheduler", "sequence"))
GPU_TESTS = "kernels/"  # those of a device are asked in its own lane


@dataclass(frozen=True)
class Property:
    """A row of the page: a property, or an input whose answer is known.

    Args:
        number: as the page has it, "7, 8" or "A1".
        tests: (file from the root, function).
    """

    number: str
    what: str
    tests: tuple[tuple[str, str], ...]


def read_page(text: str) -> list[Property]:
    """The properties that a CPU can be asked."""
    found = [
        Property(
            number,
            what,
            tuple(
                (f"tests/{path}", name)
                for path, name in TEST.findall(tests)
                if not path.startswith(GPU_TESTS)
            ),
        )
        for number, what, tests in ROW.findall(text)
    ]
    return [each for each in found if each.tests]


def check_of(properties: Sequence[Property]) -> Check:
    """All their tests in one process: importing the project costs more than most of them."""
    tests = dict.fromkeys(f"{path}::{name}" for p in properties for path, name in p.tests)
    return Check(PROPERTIES, PROPERTIES, (("tests", tuple(tests)),))


def chosen() -> list[Planted]:
    """Hand-made faults of what computes, schedules and samples, in a seeded order; none legal."""
    planted = of_device(hang(load_exhibits(), hand_made(ROOT) + own_faults(ROOT)), CPU)
    planted = [e for e in planted if not e.is_legal and e.edit.file.startswith(SOURCES)]
    Random(SEED).shuffle(planted)
    return planted


def found_by(
    properties: Sequence[Property], results: Sequence[arena.Result]
) -> dict[str, list[str]]:
    """Fault -> the numbers of the properties of which a test failed."""
    found = {}
    for result in results:
        (answer,) = result.answers
        # What crashes or hangs gives no names: no property would have passed.
        is_dead = answer.status == KILLED and not answer.levels
        failed = {tuple(name.split("::")) for name in answer.levels}
        found[result.id] = [p.number for p in properties if is_dead or failed & set(p.tests)]
    return found


def record_of(
    properties: Sequence[Property],
    planted: Sequence[Planted],
    found: Mapping[str, Sequence[str]],
    seconds: float,
    num_left_out: int = 0,
    places: Sequence[evidence.Place] = (),
) -> evidence.Evidence:
    """Counts for the properties together, and each one's own.

    Args:
        found: fault -> the numbers of the properties that find it.
        places: where the answers were found; this machine where none are given.
    """
    rows = []
    for each in properties:
        mine = [fault for fault, numbers in found.items() if each.number in numbers]
        only = [fault for fault in mine if len(found[fault]) == 1]
        rows.append((each.number, each.what, len(mine), len(only), ", ".join(only) or "none"))
    unseen = [each for each in planted if not found[each.id]]
    num_seen = len(planted) - len(unseen)
    num_unique = sum(row[3] > 0 for row in rows)
    return evidence.evidence(
        NAME,
        "Metamorphic properties",
        "Faults made by hand in the twin and in the policy, each put to every property and every "
        "adversarial input (A) of docs/properties.md and to nothing else. A property finds a fault "
        "where one of its tests fails; only it, where no other one of this table does. In a seeded "
        f"order; {num_left_out} of {len(planted) + num_left_out} faults were not begun in time.",
        "make properties",
        (
            evidence.Score("faults found by some property", num_seen, len(planted)),
            evidence.Score("properties that alone find some fault", num_unique, len(rows)),
        ),
        (
            evidence.Table(
                "By property",
                ("no.", "property", "finds", "only it", "faults that no other property finds"),
                tuple(rows),
                "At most four cases of each test were asked, without shrinking.",
            ),
            evidence.Table(
                "Faults that no property finds",
                ("fault", "what it does"),
                tuple((each.id, each.fault) for each in unseen),
                "What changes every run alike changes no relation: these need a reference, and die "
                "by one in the kill matrix.",
                is_folded=True,
            ),
        ),
        seconds,
        places,
    )


def with_findings(page: str, record: evidence.Evidence) -> str:
    """The page with its last section made of a record."""
    table = next(table for table in record.tables if table.title == "By property")
    faults, unique = record.scores
    lines = [
        page.partition(BEGIN)[0] + BEGIN,
        "## What each finds that no other does\n",
        f"{faults.hits} of {faults.total} faults planted by hand are found by these properties and "
        f"inputs. {unique.hits} of {unique.total} of them find some that no other "
        f"finds (`{record.command}`, {record.recorded[:10]}; [evidence.md](evidence.md)).\n",
        "| property | finds | only it finds |",
        "|---|---|---|",
        *(f"| no. {number} | {count} | {only} |" for number, _, count, _, only in table.rows),
    ]
    return "\n".join(lines) + "\n"


@ends_in_one_line("the answers so far are kept, and the same command goes on from there")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, records and writes the page; 0 if every property was asked, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m verification.teeth.properties")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing later")
    options = parser.parse_args(arguments)
    text = PAGE.read_text(encoding="utf-8")
    try:
        properties = read_page(text)
        asked = (check_of(properties),)
        planted = [replace(each, checks=asked) for each in chosen()]
        check_plan(planted, ROOT)
        cache = arena.Cache(ROOT / "build" / "teeth" / "properties.jsonl")

        def report(done: int, total: int, what: str) -> None:
            print(f"{done} of {total}: {what}", flush=True)

        results = arena.run(planted, CPU, cache, options.jobs, report, seconds=options.seconds)
        seconds = sum(answer.seconds for result in results for answer in result.answers)
        found = found_by(properties, results)
        tried = [each for each in planted if each.id in found]
        found_at = dict.fromkeys(answer.place for each in results for answer in each.answers)
        places = [cache.get(place) for place in found_at if place]
        left_out = len(planted) - len(tried)
        record = record_of(properties, tried, found, seconds, left_out, places)
        print(evidence.write(record).relative_to(ROOT))
        PAGE.write_text(with_findings(text, record), encoding="utf-8")
    except (EngineError, OSError) as error:
        print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
