"""The command `python -m verification.evidence_page`: makes docs/evidence.md of its records.

Decides the order and the look of the page; every figure is a record's. Invariant: the page is a
function of the records alone, so that `--check` can tell one edited by hand.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from verification.evidence import EVIDENCE, Evidence, EvidenceError, Score, Table, read, wilson

PAGE = EVIDENCE.parent / "evidence.md"

# In this order, each with what its name begins; a record of another name comes after them.
SECTIONS = ("teeth-cpu", "teeth-gpu", "localisation", "diagnosis", "false-alarms", "metamorphic")

HEADING = """# Evidence

What the suite finds, where it points, and what it wrongly accuses, measured by planting faults in
this code. Made by `make evidence` from the records in `docs/evidence/`; an edit by hand fails CI.
Intervals are Wilson's, 95 %. Each section says when, where and of which sources it was measured.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page, or checks it.

    Returns:
        0 if done or equal, 1 if the page is not that of the records or a record is refused.
    """
    parser = argparse.ArgumentParser(prog="python -m verification.evidence_page")
    parser.add_argument("--check", action="store_true", help="compare only; write nothing")
    options = parser.parse_args(arguments)
    try:
        text = render(load_all())
    except EvidenceError as error:
        print(f"error: {error}")
        return 1
    if options.check:
        is_same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("docs/evidence.md is that of its records" if is_same else OUTDATED)
        return 0 if is_same else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote docs/{PAGE.name}")
    return 0


OUTDATED = "docs/evidence.md is not that of its records: run make evidence"


def load_all(folder: Path = EVIDENCE) -> list[Evidence]:
    """Every record, in the order of the page."""
    records = [read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(records, key=_place)


def render(records: Sequence[Evidence]) -> str:
    """The page."""
    body = "\n".join([HEADING, _overview(records), *map(_section, records)])
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"{body}\n<!-- made by make evidence; sha256 of all above: {digest} -->\n"


def _place(record: Evidence) -> tuple[int, str]:
    known = [i for i, name in enumerate(SECTIONS) if record.name.startswith(name)]
    return (known[0] if known else len(SECTIONS), record.name)


def _overview(records: Sequence[Evidence]) -> str:
    rows = [
        (record.title, score.what, *_figures(score), "yes" if score.passed else "**no**")
        for record in records
        for score in record.scores
    ]
    return _markdown(("", "counted", "result", "95 % interval", "goal", "reached"), rows)


def _figures(score: Score) -> tuple[str, str, str]:
    goal = [
        f"{sign} {100 * share:g} %"
        for sign, share in (("≥", score.at_least), ("≤", score.at_most))
        if share is not None
    ]
    if score.total < 1:
        return "0 of 0", "–", " and ".join(goal) or "–"
    low, high = wilson(score.hits, score.total)
    share = f"{score.hits} of {score.total} ({100 * score.hits / score.total:.1f} %)"
    return share, f"{100 * low:.1f} to {100 * high:.1f} %", " and ".join(goal) or "–"


def _section(record: Evidence) -> str:
    machine = [f"{record.machine.get('cpu')}, {record.machine.get('cores')} cores"]
    machine += [record.machine["gpu"]] if "gpu" in record.machine else []
    facts = (
        ("repeat", f"`{record.command}`"),
        ("recorded", f"{record.recorded}, {record.seconds:.0f} s"),
        ("machine", "; ".join(machine)),
        ("csrc/", f"`{record.csrc_sha256[:16]}`"),
        ("suite", f"`{record.suite_sha256[:16]}`"),
        ("versions", ", ".join(f"{name} {value}" for name, value in record.versions.items())),
    )
    lines = [f"## {record.title}\n", f"{record.question}\n", _markdown(("", ""), facts)]
    return "\n".join([*lines, *map(_titled, record.tables)])


def _titled(table: Table) -> str:
    body = _markdown(table.columns, table.rows)
    note = f"{table.note}\n\n" if table.note else ""
    if table.is_folded:
        summary = f"<summary>{_escape(table.title)} ({len(table.rows)})</summary>"
        return f"<details>{summary}\n\n{note}{body}\n</details>\n"
    return f"### {table.title}\n\n{note}{body}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return "None.\n"
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(_escape, line))} |\n" for line in lines)


def _escape(cell: object) -> str:
    if cell is None:
        return "–"
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
