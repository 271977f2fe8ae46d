"""What the answers are worth: killed or not, by what and at which level, and whether named.

Decides what counts; knows nothing of how anything was run. Invariant: a fault made by hand counts
as killed only where its entry says that it must die: another check's luck is no kill.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from verification.mutants.faults import Edit
from verification.taps import OPERATIONS
from verification.teeth import trees
from verification.teeth.arena import ALIVE, KILLED, Answer, Result
from verification.teeth.checks import BITS, LEVEL_OF_FINDING, LEVELS, VERIFY
from verification.teeth.plan import Planted


@dataclass(frozen=True)
class Row:
    """One fault's line of the matrix.

    Args:
        is_equivalent: the list says so.
        needs: of one that is known to live, what would kill it.
    """

    planted: Planted
    result: Result
    is_equivalent: bool = False
    needs: str = ""

    @property
    def is_planted(self) -> bool:
        """Whether there was anything to find: it compiled, and to other code."""
        return self.result.build == trees.OK

    @property
    def killer(self) -> Answer | None:
        """The first check that failed, in level order."""
        return next((a for a in self.result.answers if a.status == KILLED), None)

    @property
    def is_killed(self) -> bool:
        """Whether it died as it has to: verify's by verify, the others by a check that is asked."""
        if self.planted.expected is None:
            return self.killer is not None
        return self._status(BITS if self.planted.dies_at == "system" else VERIFY) == KILLED

    @property
    def is_false_alarm(self) -> bool:
        """Whether a legal variant was failed for its numbers."""
        return self.planted.is_legal and self._status(VERIFY) != ALIVE

    @property
    def level(self) -> str | None:
        """Where it died."""
        return None if self.killer is None else level_of(self.killer, self.planted)

    @property
    def is_named(self) -> bool | None:
        """Whether the first failure points at the fault; None where nothing can be said.

        Against transformers: operator, tap and layer; of bits the operator (another order of a sum
        shows at any of its taps); of tests: they are the source's own. What a generated fault has
        to be called is known where its file is one operation's.
        """
        killer, expected = self.killer, self.planted.expected
        if killer is None:
            return False
        if expected is not None:
            if killer.named is None:
                return False
            if self.planted.dies_at == "system":
                return killer.named[0] == expected[0]
            return killer.named == expected
        if killer.label == VERIFY:
            operators = [o.name for o in OPERATIONS.values() if o.twin_file == self._file]
            return killer.named[0] in operators if operators and killer.named else None
        return killer.label in self.planted.own if self.planted.own else None

    def cell(self, column: str) -> str | None:
        """What stands in one column of LEVELS: the failed check's mark, or that nothing failed."""
        answers = [a for a in self.result.answers if column in levels_of(a, self.planted)]
        if not answers:
            return None
        return "killed" if any(_fails_at(a, column, self.planted) for a in answers) else "alive"

    @property
    def _file(self) -> str:
        return self.planted.edit.file

    def _status(self, label: str) -> str | None:
        return next((a.status for a in self.result.answers if a.label == label), None)


def rows_of(
    planted: Sequence[Planted],
    results: Sequence[Result],
    equivalents: Sequence[Edit],
    needs: Mapping[Edit, str] | None = None,
) -> list[Row]:
    """The matrix.

    Args:
        needs: what would kill those that are known to live.
    """
    return [
        Row(each, result, each.edit in equivalents, (needs or {}).get(each.edit, ""))
        for each, result in zip(planted, results, strict=True)
    ]


def level_of(answer: Answer, planted: Planted) -> str:
    """The lowest level at which a failed check failed."""
    if answer.label == VERIFY and answer.levels:
        return LEVEL_OF_FINDING[answer.levels[0]]
    return next(check.level for check in planted.checks if check.label == answer.label)


def levels_of(answer: Answer, planted: Planted) -> tuple[str, ...]:
    """The levels that a check looks at."""
    if answer.label == VERIFY:
        return LEVELS[:-1]
    return (level_of(answer, planted),)


def _fails_at(answer: Answer, column: str, planted: Planted) -> bool:
    if answer.status != KILLED:
        return False
    if answer.label == VERIFY and answer.levels:
        return column in {LEVEL_OF_FINDING[level] for level in answer.levels}
    return column == level_of(answer, planted)


@dataclass(frozen=True)
class Tally:
    """What a group came to."""

    rows: tuple[Row, ...]

    @property
    def counted(self) -> tuple[Row, ...]:
        """Those that something could find: planted and not equivalent."""
        return tuple(row for row in self.rows if row.is_planted and not row.is_equivalent)

    @property
    def killed(self) -> int:
        """Those of `counted` that died as they have to."""
        return sum(row.is_killed for row in self.counted)

    @property
    def survivors(self) -> tuple[Row, ...]:
        """Those of `counted` that did not."""
        return tuple(row for row in self.counted if not row.is_killed)

    @property
    def named(self) -> tuple[int, int]:
        """Of those killed of which it can be said: how many were named, and how many there are."""
        known = [row.is_named for row in self.counted if row.is_killed and row.is_named is not None]
        return sum(known), len(known)

    @property
    def misnamed(self) -> tuple[Row, ...]:
        """Those of `counted` that something else was named for; not those without a name."""
        return tuple(row for row in self.counted if row.is_killed and row.is_named is False)

    @property
    def at_their_level(self) -> int:
        """Those of `counted` killed at the level at which they have to die, or below."""
        return sum(
            row.is_killed and LEVELS.index(row.level) <= LEVELS.index(row.planted.dies_at)
            for row in self.counted
        )

    @property
    def wrongly_listed(self) -> tuple[Row, ...]:
        """Listed as equivalent, and killed all the same."""
        return tuple(row for row in self.rows if row.is_equivalent and row.killer is not None)
