"""The catalogue of planted faults: read from TOML, checked, and applied to a source text.

Knows texts and names; knows nothing of compilers or verdicts. Invariant: a fault's `before` occurs
exactly once in its file, or applying it raises: one that the sources outgrew is never skipped.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from engine.errors import EngineError
from verification.taps import OPERATIONS, RESULT_ORDER, operation_of

CATALOGUE_PATH = Path(__file__).resolve().parent / "catalogue.toml"
DEFAULT_MODEL = "toy"
DEFAULT_PROMPTS = "len-2,len-17,id-edges"

VERIFY, BITS = "verify", "bits"


class CatalogueError(EngineError):
    """The catalogue is malformed, or a fault no longer fits the sources; the fault is named."""


@dataclass(frozen=True)
class Mutant:
    """One fault and what the suite must say of it.

    Args:
        id: its name, unique.
        file: the source below csrc/.
        fault: what goes wrong, in one sentence.
        before, after: the text replaced and its replacement.
        operator, tap, layer: the first failure that must be named.
        found_by: VERIFY (the suite fails against transformers) or BITS (only the bits change: the
            numbers stay within every budget; what fails is the comparison with the unmutated twin).
        is_legal: BITS only: another order or legal rounding, which the rest of the suite must pass.
        model, prompts: what it needs to show, as `make verify` takes them.
        source: the real engine's bug it repeats, or why it is here.
    """

    id: str
    file: str
    fault: str
    before: str
    after: str
    operator: str
    tap: str
    layer: int = 0
    found_by: str = VERIFY
    is_legal: bool = False
    model: str = DEFAULT_MODEL
    prompts: str = DEFAULT_PROMPTS
    source: str = ""

    def __post_init__(self) -> None:
        """Refuses what could never be found or named."""
        if self.before == self.after:
            raise CatalogueError(f"mutant {self.id}: before and after are the same text")
        if self.operator not in OPERATIONS or self.tap not in RESULT_ORDER:
            raise CatalogueError(
                f"mutant {self.id}: no operator {self.operator!r} or no tap {self.tap!r}"
            )
        if operation_of(self.tap).name != self.operator:
            raise CatalogueError(
                f"mutant {self.id}: {self.tap} is computed by {operation_of(self.tap).name}, "
                f"not by {self.operator}"
            )
        if self.found_by not in (VERIFY, BITS):
            raise CatalogueError(f"mutant {self.id}: found_by is {self.found_by!r}")
        if self.is_legal and self.found_by != BITS:
            raise CatalogueError(f"mutant {self.id}: what the suite must fail cannot be legal")

    @property
    def setting(self) -> tuple[str, str]:
        """The model and the prompts it is tried on."""
        return (self.model, self.prompts)

    def apply(self, text: str) -> str:
        """The text with the fault in it.

        Raises:
            CatalogueError: `before` does not occur exactly once.
        """
        count = text.count(self.before)
        if count != 1:
            raise CatalogueError(
                f"mutant {self.id}: its text occurs {count} times in csrc/{self.file}, "
                f"must be once: {self.before.strip().splitlines()[0]}"
            )
        return text.replace(self.before, self.after)


def load_catalogue(path: Path = CATALOGUE_PATH) -> tuple[Mutant, ...]:
    """Reads the catalogue.

    Raises:
        CatalogueError: an entry has unknown or missing fields, or repeats an id.
    """
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", [])
    known = {field.name for field in fields(Mutant)}
    mutants: list[Mutant] = []
    for entry in entries:
        name = entry.get("id", "without an id")
        if unknown := sorted(set(entry) - known):
            raise CatalogueError(f"mutant {name}: unknown field {unknown[0]!r}")
        try:
            mutants.append(Mutant(**entry))
        except TypeError as error:
            raise CatalogueError(f"mutant {name}: {error}") from error
        if any(mutant.id == name for mutant in mutants[:-1]):
            raise CatalogueError(f"mutant {name}: the id is used twice")
    if not mutants:
        raise CatalogueError(f"{path.name} holds no mutants")
    return tuple(mutants)


def choose(mutants: Iterable[Mutant], only: str | None) -> tuple[Mutant, ...]:
    """Those that a list of ids, with commas between, names; all if there is none.

    Raises:
        CatalogueError: no mutant has one of the ids.
    """
    mutants = tuple(mutants)
    if only is None:
        return mutants
    wanted = [word.strip() for word in only.split(",")]
    for word in wanted:
        if all(mutant.id != word for mutant in mutants):
            raise CatalogueError(f"no mutant {word!r}")
    return tuple(mutant for mutant in mutants if mutant.id in wanted)


def check_all_apply(mutants: Iterable[Mutant], csrc: Path) -> None:
    """Tries every text against the sources.

    Raises:
        CatalogueError: one or more do not apply; all are named.
    """
    stale = []
    for mutant in mutants:
        try:
            mutant.apply((csrc / mutant.file).read_text(encoding="utf-8"))
        except (CatalogueError, OSError) as error:
            stale.append(str(error))
    if stale:
        raise CatalogueError("\n".join(stale))
