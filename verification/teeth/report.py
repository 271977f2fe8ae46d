"""The matrix as a record of evidence: scores with intervals, and the tables behind them.

Knows rows and words; what counts is matrix.py's, what the page looks like evidence_page.py's.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from verification.evidence import Evidence, Place, Score, Table, evidence
from verification.mutants.faults import GPU
from verification.teeth import trees
from verification.teeth.checks import LEVELS, VERIFY
from verification.teeth.generate import Equivalent
from verification.teeth.matrix import Row, Tally
from verification.teeth.museum import Exhibit
from verification.teeth.plan import CATALOGUE, GENERATED, MUSEUM, Planted

GENERATED_GOAL = 0.97

QUESTION = (
    "Every fault is planted in a copy of the sources, built, and run through the suite in level "
    "order: {levels}. A fault made by hand counts as killed where its entry says it must die, as "
    "named where the first failure points at its operator, tap and layer (or, for faults that "
    "tests find, is in the source's own tests). One that no longer applies fails the run."
)


@dataclass(frozen=True)
class Controls:
    """Checks of the tree without a fault: how many passed, and how many did not."""

    num_passed: int
    num_problems: int = 0


def record(
    rows: Sequence[Row],
    exhibits: Sequence[Exhibit],
    equivalents: Sequence[Equivalent],
    controls: Controls,
    device: str,
    seconds: float,
    places: Sequence[Place] = (),
    left_out: Sequence[Planted] = (),
    sample: str = "",
) -> Evidence:
    """The record of one lane; one of some groups carries their names.

    Args:
        places: where the answers were found; this machine where none are given.
        left_out: faults without an answer; no share of them is claimed.
        sample: the options that chose the generated faults, where they were given.
    """
    asked = dict.fromkeys(row.planted.group for row in rows)
    by_group = {
        group: Tally(tuple(row for row in rows if row.planted.group == group))
        for group in (CATALOGUE, MUSEUM, GENERATED)
    }
    is_part = len(asked) < len(by_group)
    return evidence(
        "-".join((f"teeth-{device}", *(asked if is_part else ()))),
        f"Kill matrix, {device.upper()} lane" + (f": {', '.join(asked)}" if is_part else ""),
        QUESTION.format(levels=", ".join(LEVELS)),
        "make teeth"
        + (" DEVICE=cuda" if device == GPU else "")
        + _arguments(asked if is_part else (), sample),
        tuple(_scores(by_group, controls)),
        tuple(_tables(by_group, exhibits, equivalents, left_out)),
        seconds,
        places,
    )


def _arguments(groups: Iterable[str], sample: str) -> str:
    groups = ",".join(groups)
    words = [f"--groups {groups}"] if groups else []
    words += [sample] if sample else []
    words += ["--record"] if groups else []
    return f' ARGS="{" ".join(words)}"' if words else ""


def _scores(by_group: dict[str, Tally], controls: Controls):
    names = {CATALOGUE: "hand catalogue", MUSEUM: "bug museum"}
    for group, name in names.items():
        tally = by_group[group]
        total = len(tally.counted)
        if not total:
            continue
        yield Score(f"{name}: killed", tally.killed, total, at_least=1.0)
        yield Score(f"{name}: named first", *tally.named, at_least=1.0)
        yield Score(f"{name}: died at the level it must", tally.at_their_level, total, 1.0)
    tally = by_group[GENERATED]
    if tally.counted:
        total = len(tally.counted)
        yield Score(
            "generated: killed, of those not equivalent", tally.killed, total, GENERATED_GOAL
        )
        yield Score("generated: named, where a name is known", *tally.named)
    listed = sum(row.is_equivalent for row in tally.rows)
    if listed:
        wrongly = len(tally.wrongly_listed)
        yield Score("listed as equivalent, but killed", wrongly, listed, at_most=0.0)
    legal = [row for each in by_group.values() for row in each.rows if row.planted.is_legal]
    alarms = sum(row.is_false_alarm for row in legal)
    if controls.num_problems:
        asked = controls.num_passed + controls.num_problems
        what = "checks that fail without a fault, or do not answer"
        yield Score(what, controls.num_problems, asked, at_most=0.0)
    total = len(legal) + controls.num_passed
    yield Score("correct engines and legal variants wrongly failed", alarms, total, at_most=0.0)


def _tables(
    by_group: dict[str, Tally],
    exhibits: Sequence[Exhibit],
    equivalents: Sequence[Equivalent],
    left_out: Sequence[Planted],
):
    if left_out:
        counts = Counter(each.group for each in left_out)
        note = "The time ended before they began, or a check gave no answer; they are in no count."
        yield Table("Not tried", ("group", "faults"), tuple(counts.items()), note)
    if missing := [group for group, tally in by_group.items() if not tally.rows]:
        note = "No share of these is claimed here."
        yield Table("Not run", ("group",), tuple((group,) for group in missing), note)
    if by_group[MUSEUM].rows:
        yield _museum(by_group[MUSEUM].rows, exhibits)
    yield from (_matrix(by_group[group].rows) for group in [CATALOGUE] if by_group[group].rows)
    generated = by_group[GENERATED]
    if generated.rows:
        yield _by_file(generated.rows)
        yield Table(
            "Generated faults that survived",
            ("where", "fault", "what would kill it"),
            tuple((r.planted.id, r.planted.fault, r.needs or None) for r in generated.survivors),
            "Each is a hole: the list is here to be emptied by better tests.",
        )
        files = {row.planted.edit.file for row in generated.rows}
        listed = [each for each in equivalents if each.edit.file in files]
        rows = tuple((e.edit.file, e.edit.before, e.edit.after, e.reason) for e in listed)
        note = "Planted all the same in each run; one that a check killed would fail it."
        columns = ("file", "line", "becomes", "why nobody can see it")
        yield Table("Equivalent mutations", columns, rows, note, is_folded=True)


def _museum(rows: Sequence[Row], exhibits: Sequence[Exhibit]) -> Table:
    by_id = {row.planted.id: row for row in rows}
    shown = [(exhibit, by_id[exhibit.fault]) for exhibit in exhibits if exhibit.fault in by_id]
    return Table(
        "The bug museum",
        ("engine", "bug", "source", "planted here as", "killed by", "at level", "named"),
        tuple(
            (e.engine, e.bug, e.source, e.fault, _killer(row), row.level, _yes(row.is_named))
            for e, row in shown
        ),
        "Public bugs of other engines, planted here; each with the check that would have caught "
        "it.",
    )


def _matrix(rows: Sequence[Row]) -> Table:
    return Table(
        "The hand catalogue",
        ("fault", "file", "must die at", "first killed by", "named", *LEVELS),
        tuple(
            (
                row.planted.id,
                row.planted.edit.file,
                "bits alone: legal" if row.planted.is_legal else row.planted.dies_at,
                _killer(row),
                _yes(row.is_named),
                *(row.cell(level) for level in LEVELS),
            )
            for row in rows
        ),
        "A dash: that level was not asked, because the fault was dead or no check of it applies.",
        is_folded=True,
    )


def _by_file(rows: Sequence[Row]) -> Table:
    lines = []
    for file in sorted({row.planted.edit.file for row in rows}):
        mine = Tally(tuple(row for row in rows if row.planted.edit.file == file))
        builds = [row.result.build for row in mine.rows]
        killers = [row.killer.label for row in mine.counted if row.is_killed]
        by_verify = killers.count(VERIFY)
        lines.append(
            (
                file,
                len(mine.rows),
                builds.count(trees.STILLBORN),
                builds.count(trees.EQUAL),
                sum(row.is_equivalent for row in mine.rows),
                by_verify,
                len(killers) - by_verify,
                len(mine.survivors),
            )
        )
    columns = ("planted", "do not compile", "same object code", "listed as equivalent")
    columns += ("killed by verify", "killed by tests", "alive")
    return Table("Generated faults by source", ("source", *columns), tuple(lines))


def _killer(row: Row) -> str:
    if row.killer is None:
        return "nothing"
    if row.killer.label == VERIFY and row.killer.named is not None:
        operator, tap, layer = row.killer.named
        return f"{operator} ({tap}, layer {layer})"
    return row.killer.by if row.killer.by.startswith("tests/") else row.killer.label


def _yes(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"
