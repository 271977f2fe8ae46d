"""The bug museum: public bugs of other engines, planted here, with what would have caught each.

An exhibit tells whose bug it was and points at a fault, in museum.toml itself or in one of the
other files; knows nothing of how faults are run. Invariant: every exhibit's fault is there.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from verification.mutants.catalogue import CatalogueError, Mutant, load_catalogue
from verification.mutants.faults import HERE, load_faults, missing_tests
from verification.teeth.plan import MUSEUM, Planted, from_mutant, from_tested

MUSEUM_PATH = HERE / "museum.toml"


@dataclass(frozen=True)
class Exhibit:
    """One public bug.

    Args:
        engine: whose it was.
        bug: what was wrong there, in a sentence.
        source: where it can be read: issue, pull request, file.
        fault: the id of the fault that plants it here.
    """

    engine: str
    bug: str
    source: str
    fault: str


def load_exhibits(path: Path = MUSEUM_PATH) -> tuple[Exhibit, ...]:
    """Reads the [[exhibit]] entries.

    Raises:
        CatalogueError: an entry has unknown or missing fields, or none has any.
    """
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("exhibit", [])
    known = {field.name for field in fields(Exhibit)}
    for entry in entries:
        if set(entry) != known or not all(entry.values()):
            raise CatalogueError(f"exhibit {entry.get('bug')!r}: fields must be {sorted(known)}")
    if not entries:
        raise CatalogueError(f"{path.name} has no exhibits")
    return tuple(Exhibit(**entry) for entry in entries)


def own_faults(root: Path, path: Path = MUSEUM_PATH) -> list[Planted]:
    """The faults that museum.toml itself holds."""
    tested = load_faults(path)
    if missing := missing_tests(tested, root):
        raise CatalogueError(f"no such tests: {', '.join(missing)}")
    mutants: Sequence[Mutant] = ()
    if "mutant" in tomllib.loads(path.read_text(encoding="utf-8")):
        mutants = load_catalogue(path)
    return [from_mutant(m, MUSEUM) for m in mutants] + [from_tested(f, MUSEUM) for f in tested]


def hang(exhibits: Sequence[Exhibit], planted: Sequence[Planted]) -> list[Planted]:
    """The plan, with those faults that are exhibited in the group MUSEUM.

    Raises:
        CatalogueError: an exhibit's fault is nowhere, or one of the museum's own is not exhibited.
    """
    ids = {each.id for each in planted}
    shown = {exhibit.fault for exhibit in exhibits}
    if unknown := sorted(shown - ids):
        raise CatalogueError(f"exhibits without their fault: {', '.join(unknown)}")
    if hidden := sorted(p.id for p in planted if p.group == MUSEUM and p.id not in shown):
        raise CatalogueError(f"faults of the museum without an exhibit: {', '.join(hidden)}")
    return [replace(each, group=MUSEUM) if each.id in shown else each for each in planted]
