"""What is planted: hand-made faults of all kinds, the bug museum, and generated ones.

Brings them into one form, each with its checks; knows nothing of how they are run or judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from verification.mutants.catalogue import (
    BITS,
    CATALOGUE_PATH,
    CatalogueError,
    Mutant,
    load_catalogue,
)
from verification.mutants.faults import (
    CPU,
    GPU,
    HERE,
    Edit,
    TestedFault,
    check_edits_apply,
    load_faults,
    load_policy,
    missing_tests,
)
from verification.teeth import checks
from verification.teeth.checks import Check

CATALOGUE, MUSEUM, GENERATED = "hand", "museum", "generated"
FAULT_FILES = ("sampling.toml", "runtime.toml", "kernels.toml")
POLICY_PATH = HERE / "policy.toml"


@dataclass(frozen=True)
class Planted:
    """One fault with everything that is asked of it.

    Args:
        group: CATALOGUE, MUSEUM or GENERATED.
        checks: in level order.
        wants_all: whether every check is run, or only up to the first that fails.
        expected: (operator, tap, layer) to be named first; None where tests find it.
        dies_at: the level at which it has to die.
        own: labels of the checks of which one must be the first to fail; none: it may be any.
        is_legal: the numbers are as right as before: only bits may notice.
    """

    id: str
    group: str
    device: str
    edit: Edit
    fault: str
    checks: tuple[Check, ...]
    wants_all: bool = False
    expected: tuple[str, str, int] | None = None
    dies_at: str = "operator"
    own: tuple[str, ...] = ()
    is_legal: bool = False
    source: str = ""


def from_mutant(mutant: Mutant, group: str = CATALOGUE) -> Planted:
    """One of catalogue.toml: every level is asked, and the bits."""
    return Planted(
        mutant.id,
        group,
        CPU,
        Edit(f"csrc/{mutant.file}", mutant.before, mutant.after),
        mutant.fault,
        (checks.verify(*mutant.setting), checks.bits(*mutant.setting)),
        wants_all=True,
        expected=(mutant.operator, mutant.tap, mutant.layer),
        dies_at="system" if mutant.found_by == BITS else "operator",
        is_legal=mutant.is_legal,
        source=mutant.source,
    )


def from_tested(fault: TestedFault, group: str = CATALOGUE) -> Planted:
    """One that a test must find; the first listed is its own."""
    asked = tuple(checks.tests(test, fault.device) for test in fault.tests)
    return Planted(
        fault.id,
        group,
        fault.device,
        fault.edit,
        fault.fault,
        asked,
        dies_at=asked[0].level,
        own=(asked[0].label,),
        source=fault.source,
    )


def hand_made(root: Path) -> list[Planted]:
    """The catalogue, and every other file of faults that is there."""
    faults = [fault for name in FAULT_FILES for fault in load_faults(HERE / name)]
    policy = load_policy(POLICY_PATH, root)
    if missing := missing_tests([*faults, *policy], root):
        raise CatalogueError(f"no such tests: {', '.join(missing)}")
    planted = [from_mutant(mutant) for mutant in load_catalogue(CATALOGUE_PATH)]
    planted += [from_tested(fault) for fault in faults]
    # A schedule's fault may show in any of the tests that drive the schedule: none has to be first.
    anywhere = [replace(from_tested(each), dies_at="system", own=()) for each in policy]
    return planted + anywhere


def check_plan(planted: Sequence[Planted], root: Path) -> None:
    """Refuses what cannot be planted.

    Raises:
        CatalogueError: an edit does not apply, or an id is used twice; all are named.
    """
    ids = [each.id for each in planted]
    if repeated := sorted({each for each in ids if ids.count(each) > 1}):
        raise CatalogueError(f"ids used twice: {', '.join(repeated)}")
    check_edits_apply([(each.id, each.edit) for each in planted], root)


def of_device(planted: Sequence[Planted], device: str) -> list[Planted]:
    """Those that a machine can show: a GPU machine the GPU's alone."""
    assert device in (CPU, GPU)
    return [each for each in planted if each.device == device]
