"""Faults that tests must find: edits of any source of the checkout, each with the tests to run.

The other kind, catalogue.py's, is of the forward pass and found by comparing with transformers;
this one serves policy, refusals and kernels. Knows texts and names; knows nothing of compilers or
verdicts. Invariant: as there, an edit whose text is not where it was raises, it is never skipped.
"""

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from verification.mutants.catalogue import CatalogueError
from verification.mutants.policy import TESTS

HERE = Path(__file__).resolve().parent
CPU, GPU = "cpu", "gpu"


@dataclass(frozen=True)
class Edit:
    """One change of one source.

    Args:
        file: from the root of the checkout.
        before, after: the text replaced and its replacement.
        occurrence: None: `before` must be there once; else it is whole lines, stripped, and this
            counts the equal ones before it.
    """

    file: str
    before: str
    after: str
    occurrence: int | None = None

    def apply(self, text: str) -> str:
        """The text with the change in it.

        Raises:
            CatalogueError: `before` is not there, or not once.
        """
        if self.before == self.after:
            raise CatalogueError(f"{self.file}: before and after are the same text")
        if self.occurrence is None:
            count = text.count(self.before)
            if count != 1:
                first = self.before.strip().splitlines()[0]
                raise CatalogueError(
                    f"the text occurs {count} times in {self.file}, must be once: {first}"
                )
            return text.replace(self.before, self.after)
        lines = text.split("\n")
        places = [i for i, line in enumerate(lines) if line.strip() == self.before]
        if self.occurrence >= len(places):
            raise CatalogueError(
                f"{self.file} has {len(places)} lines, must be more than {self.occurrence}, that "
                f"say: {self.before}"
            )
        place = places[self.occurrence]
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        return "\n".join([*lines[:place], indent + self.after, *lines[place + 1 :]])


@dataclass(frozen=True)
class TestedFault:
    """One fault and the tests of which one must fail.

    Args:
        id: its name, unique.
        file: the source, from the root of the checkout.
        fault: what goes wrong, in one sentence.
        before, after: the text replaced, there once, and its replacement.
        tests: test files, or tests by their pytest ids, in the order in which they are run; the
            first is the fault's own: it must be the one that fails.
        device: CPU, or GPU for what only a device can show.
        source: the real engine's bug it repeats, or why it is here.
    """

    __test__ = False  # not pytest's, whatever the name

    id: str
    file: str
    fault: str
    before: str
    after: str
    tests: tuple[str, ...]
    device: str = CPU
    source: str = ""

    def __post_init__(self) -> None:
        """Refuses what could never be found."""
        if not self.tests:
            raise CatalogueError(f"fault {self.id}: no tests to find it")
        if self.device not in (CPU, GPU):
            raise CatalogueError(f"fault {self.id}: device is {self.device!r}")
        if self.before == self.after:
            raise CatalogueError(f"fault {self.id}: before and after are the same text")

    @property
    def edit(self) -> Edit:
        """The change it is."""
        return Edit(self.file, self.before, self.after)


def load_faults(path: Path) -> tuple[TestedFault, ...]:
    """Reads the [[fault]] entries of a file; a file that is not there has none.

    Raises:
        CatalogueError: an entry has unknown or missing fields, or repeats an id.
    """
    if not path.exists():
        return ()
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("fault", [])
    known = {field.name for field in fields(TestedFault)}
    faults: dict[str, TestedFault] = {}
    for entry in entries:
        name = entry.get("id", "without an id")
        if unknown := sorted(set(entry) - known):
            raise CatalogueError(f"fault {name}: unknown field {unknown[0]!r}")
        if name in faults:
            raise CatalogueError(f"fault {name}: the id is used twice")
        try:
            faults[name] = TestedFault(**entry | {"tests": tuple(entry["tests"])})
        except (KeyError, TypeError) as error:
            raise CatalogueError(f"fault {name}: {error}") from error
    return tuple(faults.values())


def load_policy(path: Path, root: Path) -> tuple[TestedFault, ...]:
    """Reads policy.toml: [[mutant]] entries whose file is below engine/ and that list no tests.

    Each meets its module's tests first, then those that verification.mutants.policy runs.

    Raises:
        CatalogueError: an entry has unknown or missing fields.
    """
    if not path.exists():
        return ()
    faults = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", []):
        own = f"tests/engine/test_{Path(entry['file']).stem}.py"
        asked = [own, *TESTS] if (root / own).exists() else TESTS
        fields_here = entry | {
            "file": f"engine/{entry['file']}",
            "tests": tuple(dict.fromkeys(asked)),
        }
        try:
            faults.append(TestedFault(**fields_here))
        except TypeError as error:
            raise CatalogueError(f"fault {entry.get('id')}: {error}") from error
    return tuple(faults)


def check_edits_apply(named: Iterable[tuple[str, Edit]], root: Path) -> None:
    """Tries every edit against the sources.

    Raises:
        CatalogueError: one or more do not apply; all are named.
    """
    stale = []
    for name, edit in named:
        try:
            edit.apply((root / edit.file).read_text(encoding="utf-8"))
        except (CatalogueError, OSError) as error:
            stale.append(f"{name}: {error}")
    if stale:
        raise CatalogueError("\n".join(stale))


def missing_tests(faults: Sequence[TestedFault], root: Path) -> list[str]:
    """Test files that faults name and the checkout has not."""
    files = {test.partition("::")[0] for fault in faults for test in fault.tests}
    return sorted(file for file in files if not (root / file).exists())
