"""Which planted faults the metamorphic properties find, and which only one of them finds.

`python -m verification.teeth.properties` plants faults made by hand, asks every property that
docs/properties.md lists of each, writes the record docs/evidence/metamorphic.json and the page's
last section. Knows the page and what a property is asked; knows nothing of how trees are built.
A property's tests are the page's, the first cases of each: a fault costs all of them.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.errors import EngineError
from verification import evidence
from verification.mutants.build import ROOT
from verification.mutants.faults import CPU
from verification.teeth import arena
from verification.teeth.arena import KILLED
from verification.teeth.checks import PROPERTIES, Check
from verification.teeth.museum import hang, load_exhibits, own_faults
from verification.teeth.plan import MUSEUM, Planted, check_plan, hand_made, of_device

PAGE = ROOT / "docs" / "properties.md"
NAME = "metamorphic"
ROW = re.compile(r"^\| (A?\d[\d, ]*) \| (.+?) \| [BT] \| (.+) \|$", re.M)
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")
BEGIN = "<!-- below: made by make properties -->\n"
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


def checks_of(properties: Sequence[Property]) -> tuple[Check, ...]:
    """A check for every file with their tests."""
    files: dict[str, list[str]] = {}
    for each in properties:
        for path, name in each.tests:
            files.setdefault(path, []).append(name)
    return tuple(
        Check(PROPERTIES, path, (("path", path), ("names", tuple(dict.fromkeys(names)))))
        for path, names in files.items()
    )


def chosen(step: int) -> list[Planted]:
    """The museum's faults of the engine and every `step`-th other one made by hand; none legal."""
    planted = of_device(hang(load_exhibits(), hand_made(ROOT) + own_faults(ROOT)), CPU)
    planted = [each for each in planted if not each.is_legal]
    museum = [each for each in planted if each.group == MUSEUM]
    return museum + [each for each in planted if each.group != MUSEUM][::step]


def found_by(
    properties: Sequence[Property], results: Sequence[arena.Result]
) -> dict[str, list[str]]:
    """Fault -> the numbers of the properties of which a test failed."""
    found = {}
    for result in results:
        failed = {(a.label, name) for a in result.answers for name in a.levels}
        # What crashes or hangs gives no names: no test of that file would have passed.
        dead = {a.label for a in result.answers if a.status == KILLED and not a.levels}
        failed |= {test for p in properties for test in p.tests if test[0] in dead}
        found[result.id] = [p.number for p in properties if failed & set(p.tests)]
    return found


def record_of(
    properties: Sequence[Property],
    planted: Sequence[Planted],
    found: Mapping[str, Sequence[str]],
    seconds: float,
) -> evidence.Evidence:
    """Counts for the properties together, and each one's own."""
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
        "where one of its tests fails; only it, where no other one of this table does.",
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, records and writes the page; 0 if every property was asked, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m verification.teeth.properties")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--step", type=int, default=1, help="of faults beside the museum's")
    options = parser.parse_args(arguments)
    text = PAGE.read_text(encoding="utf-8")
    try:
        properties = read_page(text)
        asked = checks_of(properties)
        planted = [replace(e, checks=asked, wants_all=True) for e in chosen(options.step)]
        check_plan(planted, ROOT)
        cache = arena.Cache(ROOT / "build" / "teeth" / "properties.jsonl")

        def report(done: int, total: int, what: str) -> None:
            print(f"{done} of {total}: {what}", flush=True)

        results = arena.run(planted, CPU, cache, options.jobs, report)
        seconds = sum(answer.seconds for result in results for answer in result.answers)
        record = record_of(properties, planted, found_by(properties, results), seconds)
        print(evidence.write(record).relative_to(ROOT))
        PAGE.write_text(with_findings(text, record), encoding="utf-8")
    except (EngineError, OSError) as error:
        print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
