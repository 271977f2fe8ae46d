"""Tries the catalogue: control first, then every fault, and what each verdict is worth.

Decides what counts as found and as named; knows nothing of how the suite judges. Invariant: nothing
is left out: a fault whose text no longer applies, or that does not compile, ends the whole run.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verification.mutants.build import ROOT, Workshop, workshop
from verification.mutants.catalogue import BITS, VERIFY, Mutant, check_all_apply
from verification.mutants.judge import Judge, Named, Setting, quiet_torch


@dataclass(frozen=True)
class Outcome:
    """What the suite said of one fault.

    Args:
        verified: its first failure against transformers; None if it passed, or was not asked.
        was_verified: whether it was asked.
        bits: the first tap with other bits; None if all are equal, or was not asked.
    """

    mutant: Mutant
    verified: Named | None
    was_verified: bool
    bits: Named | None
    seconds: float

    @property
    def first(self) -> Named | None:
        """The verdict that the catalogue asks for."""
        return self.verified if self.mutant.found_by == VERIFY else self.bits

    @property
    def is_found(self) -> bool:
        """Whether the suite failed as the catalogue says."""
        return self.first is not None

    @property
    def is_named(self) -> bool:
        """Whether the first failure is at the operator, tap and layer of the fault.

        Other bits under a bf16 rounding come out first where a value lies on that rounding's edge,
        which may be any tap of the operator: there the operator alone must be right.
        """
        mutant, first = self.mutant, self.first
        if first is None or first.operator != mutant.operator:
            return False
        return mutant.found_by == BITS or (first.tap, first.layer) == (mutant.tap, mutant.layer)

    @property
    def is_false_alarm(self) -> bool:
        """Whether another legal order or rounding was failed for its numbers."""
        return self.mutant.is_legal and self.verified is not None

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        first = self.first
        return {
            "id": self.mutant.id,
            "file": self.mutant.file,
            "fault": self.mutant.fault,
            "model": self.mutant.model,
            "prompts": self.mutant.prompts,
            "found_by": self.mutant.found_by,
            "is_legal": self.mutant.is_legal,
            "expected": [self.mutant.operator, self.mutant.tap, self.mutant.layer],
            "found": self.is_found,
            "named": self.is_named,
            "false_alarm": self.is_false_alarm,
            "first": None if first is None else [first.operator, first.tap, first.layer],
            "message": None if first is None else first.message,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True)
class Trial:
    """One run of the catalogue.

    Args:
        control: what the suite said of the unmutated library, per setting; None is a pass.
    """

    control: dict[Setting, Named | None]
    outcomes: tuple[Outcome, ...]

    @property
    def num_found(self) -> int:
        """Faults that the suite failed."""
        return sum(outcome.is_found for outcome in self.outcomes)

    @property
    def num_named(self) -> int:
        """Faults whose place it named first."""
        return sum(outcome.is_named for outcome in self.outcomes)

    @property
    def num_legal(self) -> int:
        """Faults that are legal variants: the rest of the suite must pass them."""
        return sum(outcome.mutant.is_legal for outcome in self.outcomes)

    @property
    def num_false_alarms(self) -> int:
        """Correct engines that were failed: legal variants, and the control's settings."""
        control = sum(named is not None for named in self.control.values())
        return control + sum(outcome.is_false_alarm for outcome in self.outcomes)

    @property
    def passed(self) -> bool:
        """Whether all faults were found and named and nothing correct was failed."""
        total = len(self.outcomes)
        return total == self.num_found == self.num_named and self.num_false_alarms == 0

    @property
    def summary(self) -> str:
        """The result in one line."""
        total, num_correct = len(self.outcomes), len(self.control) + self.num_legal
        return (
            f"found {self.num_found} of {total}, named {self.num_named} of {total}; "
            f"correct engines wrongly failed {self.num_false_alarms} of {num_correct}"
        )

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return {
            "passed": self.passed,
            "num_mutants": len(self.outcomes),
            "num_found": self.num_found,
            "num_named": self.num_named,
            "num_correct": len(self.control) + self.num_legal,
            "num_false_alarms": self.num_false_alarms,
            "control": [
                {"model": model, "prompts": prompts, "failed": named and named.message}
                for (model, prompts), named in self.control.items()
            ],
            "mutants": [outcome.to_json() for outcome in self.outcomes],
        }


def run(
    mutants: Sequence[Mutant],
    report: Callable[[Outcome], None] | None = None,
    root: Path = ROOT,
) -> Trial:
    """Tries every fault.

    Args:
        report: told each outcome as it comes.
        root: the checkout whose csrc/ and Makefile are copied.

    Raises:
        CatalogueError: a text does not apply once to its file.
        BuildError: something does not compile.
    """
    check_all_apply(mutants, root / "csrc")
    with workshop(root) as shop, quiet_torch():
        judge = Judge(shop.pristine.library())
        settings = list(dict.fromkeys(mutant.setting for mutant in mutants))
        control = {setting: judge.verify(None, setting) for setting in settings}
        outcomes = []
        for outcome in _outcomes(shop, judge, mutants):
            outcomes.append(outcome)
            if report is not None:
                report(outcome)
    return Trial(control, tuple(outcomes))


def _outcomes(shop: Workshop, judge: Judge, mutants: Sequence[Mutant]):
    for mutant, tree in shop.plant_all(mutants):
        clock = time.monotonic()
        library = tree.library()
        was_verified = mutant.found_by == VERIFY or mutant.is_legal
        verified = judge.verify(library, mutant.setting) if was_verified else None
        # Where the suite passes what it should fail, the bits tell whether the fault does anything.
        wants_bits = mutant.found_by == BITS or verified is None
        bits = judge.bits(library, mutant.setting) if wants_bits else None
        yield Outcome(mutant, verified, was_verified, bits, time.monotonic() - clock)
