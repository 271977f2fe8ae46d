"""Plants each fault of policy.toml in a copy of engine/; the fast policy tests must fail.

`python -m verification.mutants.policy` runs them all. The judge is pytest, in a process and a tree
of its own; the checkout is never written to. Exit status: 0 every fault was found and the tests
pass without one, 1 not so, or a fault's text no longer applies.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from verification.interrupts import ends_in_one_line
from verification.mutants.catalogue import CatalogueError

ROOT = Path(__file__).resolve().parent.parent.parent
POLICY_PATH = Path(__file__).resolve().parent / "policy.toml"
# The quickest first: most faults are found in seconds. Without the toy: they need no library.
TESTS = (
    "tests/engine/test_block_manager.py",
    "tests/engine/test_edit_table.py",
    "tests/engine/test_running_batch.py",
    "tests/engine/test_scheduler.py",
    "tests/engine/test_answer_text.py",
    "tests/engine/test_llm_engine.py",
    "tests/system/test_looking_ahead.py",
    "tests/system/test_small_scope.py",
    "tests/system/test_schedule_transparency.py",
)
OPTIONS = ("-x", "-q", "-m", "not slow", "-k", "not toy and not saved", "-p", "no:cacheprovider")
PROFILE = "--hypothesis-profile=mutants"  # finds, does not shrink
PARALLEL = 2


@dataclass(frozen=True)
class PolicyMutant:
    """One fault: where, the text that occurs once, and what stands there instead."""

    id: str
    file: str
    fault: str
    before: str
    after: str
    source: str = ""

    def apply(self, text: str) -> str:
        """The text with the fault in it.

        Raises:
            CatalogueError: `before` does not occur exactly once.
        """
        count = text.count(self.before)
        if count != 1:
            raise CatalogueError(
                f"mutant {self.id}: its text occurs {count} times in engine/{self.file}, "
                "must be once"
            )
        return text.replace(self.before, self.after)


@dataclass(frozen=True)
class Verdict:
    """What the tests said: the first that failed, or None."""

    mutant: PolicyMutant | None  # None: the unmutated policy
    found_by: str | None


def load_policy(path: Path = POLICY_PATH) -> tuple[PolicyMutant, ...]:
    """Reads the faults.

    Raises:
        CatalogueError: a field is unknown or missing, or an id comes twice.
    """
    mutants: list[PolicyMutant] = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
        try:
            mutants.append(PolicyMutant(**entry))
        except TypeError as error:
            raise CatalogueError(f"mutant {entry.get('id')}: {error}") from error
    ids = [mutant.id for mutant in mutants]
    if len(set(ids)) != len(ids):
        raise CatalogueError(f"an id is used twice in {path.name}")
    return tuple(mutants)


def check_all_apply(mutants: Iterable[PolicyMutant], root: Path = ROOT) -> None:
    """Tries every text; raises CatalogueError naming all that do not apply."""
    stale = []
    for mutant in mutants:
        try:
            mutant.apply((root / "engine" / mutant.file).read_text(encoding="utf-8"))
        except (CatalogueError, OSError) as error:
            stale.append(str(error))
    if stale:
        raise CatalogueError("\n".join(stale))


def judge(mutant: PolicyMutant | None, tests: Sequence[str] = TESTS, root: Path = ROOT) -> Verdict:
    """Runs the tests on a copy of the tree with the fault in it, if there is one."""
    with TemporaryDirectory(prefix="touchstone-policy-") as folder:
        tree = Path(folder)
        ignored = shutil.ignore_patterns("__pycache__", "libengine.so")
        for name in ("engine", "tests"):
            shutil.copytree(root / name, tree / name, ignore=ignored)
        shutil.copy2(root / "pyproject.toml", tree)
        if mutant is not None:
            path = tree / "engine" / mutant.file
            path.write_text(mutant.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *OPTIONS, PROFILE, *tests],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == 0:
        return Verdict(mutant, None)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode != 1 or not failed:
        raise CatalogueError(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-500:]}")
    return Verdict(mutant, failed[0].split(" ")[1].split("/")[-1])


def run(mutants: Sequence[PolicyMutant]) -> Iterator[Verdict]:
    """The unmutated policy first, then every fault, in order."""
    check_all_apply(mutants)
    with ThreadPoolExecutor(PARALLEL) as pool:
        yield from pool.map(judge, (None, *mutants))


@ends_in_one_line("nothing was written")
def main(arguments: Sequence[str] | None = None) -> int:
    """The whole command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m verification.mutants.policy")
    parser.add_argument("--only", metavar="IDS", help="mutant ids with commas; all by default")
    options = parser.parse_args(arguments)
    try:
        mutants = load_policy()
        if options.only is not None:
            wanted = options.only.split(",")
            mutants = tuple(mutant for mutant in mutants if mutant.id in wanted)
            if len(mutants) != len(wanted):
                raise CatalogueError(f"no such mutant among {options.only}")
        num_found, is_sound = 0, True
        for verdict in run(mutants):
            if verdict.mutant is None:
                is_sound = verdict.found_by is None
                print("unmutated:", "passes" if is_sound else f"FAILS {verdict.found_by}")
                continue
            num_found += verdict.found_by is not None
            print(f"{verdict.mutant.id:38} {verdict.found_by or 'NOT FOUND'}", flush=True)
    except CatalogueError as error:
        print(f"error: {error}")
        return 1
    print(f"found {num_found} of {len(mutants)}")
    return 0 if is_sound and num_found == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
