"""Generated faults: a seeded sample of one-line mutations over every source that decides a result.

Decides which sources are mutated, which lines and how; what is equivalent is a list with reasons,
equivalent.toml, and every entry of it is planted all the same: one that a check kills was no
equivalent and fails the run. Knows nothing of how faults are run.
"""

import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from verification.mutants.catalogue import CatalogueError
from verification.mutants.faults import GPU, HERE, Edit
from verification.teeth import checks
from verification.teeth.c_mutations import Mutation, mutable_lines, mutations
from verification.teeth.plan import GENERATED, Planted
from verification.teeth.python_mutations import mutations_of

EQUIVALENT_PATH = HERE / "equivalent.toml"
SURVIVOR_PATH = HERE / "survivors.toml"
SEED = 20261121

CPU_FOLDERS = ("csrc/twin", "csrc/model")
GPU_FOLDERS = ("csrc/kernels",)
C_SUFFIXES = (".c", ".h", ".cu", ".cuh")
# What the twin never runs: members that only the GPU's table has; the GPU's lane mutates it.
GPU_MODEL = ("csrc/model/decode.c", "csrc/model/prefill.c")
NO_KERNELS = ("csrc/kernels/kernels.h", "csrc/kernels/no_cuda.c")

# What reads files, text and the C library; the rest of engine/ is policy: what is run, and when.
NOT_POLICY = {
    *("__init__", "__main__", "bench", "bench_command", "bindings", "checkpoint", "config"),
    *("config_fields", "errors", "foreign"),
    *("json_file", "models", "ops", "safetensors_file", "source_stamp", "tap", "tokenizer"),
}


@dataclass(frozen=True)
class Equivalent:
    """A mutation that changes nothing anybody can see, and why."""

    edit: Edit
    reason: str


@dataclass(frozen=True)
class Survivor:
    """A mutation that no check kills yet, and what would."""

    edit: Edit
    needs: str


@dataclass(frozen=True)
class Line:
    """A line with all its mutations; before and after are the whole line, stripped."""

    number: int  # from 1
    occurrence: int  # equal lines before it
    mutations: tuple[Mutation, ...]


def sources(root: Path, device: str) -> list[str]:
    """The mutated sources of a device, from the root of the checkout."""
    folders = GPU_FOLDERS if device == GPU else CPU_FOLDERS
    found = [
        path.relative_to(root).as_posix()
        for folder in folders
        for path in (root / folder).iterdir()
        if path.suffix in C_SUFFIXES
    ]
    if device == GPU:
        return sorted([name for name in found if name not in NO_KERNELS] + list(GPU_MODEL))
    policy = [p for p in (root / "engine").glob("*.py") if p.stem not in NOT_POLICY]
    found += [path.relative_to(root).as_posix() for path in policy]
    return sorted(name for name in found if name not in GPU_MODEL)


def lines_of(name: str, text: str) -> list[Line]:
    """The lines of a source that can be mutated."""
    if name.endswith(".py"):
        return list(_python_lines(text))
    lines = []
    numbers = _numbers(text)
    for line, occurrence, can_delete in mutable_lines(text):
        code = line.split("//")[0].rstrip()
        found = tuple(Mutation(m.kind, line, m.after) for m in mutations(code, can_delete))
        if found:
            lines.append(Line(numbers[line, occurrence], occurrence, found))
    return lines


def generated(root: Path, device: str, count: int | None, seed: int = SEED) -> list[Planted]:
    """A sample of mutations, spread over the sources by their lines; no two of one line.

    Args:
        count: how many; at least one of each source. None: one of every line.
    """
    lines = {
        name: lines_of(name, (root / name).read_text(encoding="utf-8"))
        for name in sources(root, device)
    }
    total = sum(map(len, lines.values()))
    planted = []
    for name, found in lines.items():
        order = random.Random(f"{seed} {name}")  # one source's sample does not depend on another's
        picked = [(line, order.choice(line.mutations)) for line in found]
        order.shuffle(picked)
        share = len(found) if count is None else max(1, round(count * len(found) / total))
        planted += [_planted(name, *each, device, root) for each in picked[:share]]
    random.Random(seed).shuffle(planted)  # a run that ends early has tried a fair part
    return planted


def _planted(name: str, line: Line, mutation: Mutation, device: str, root: Path) -> Planted:
    return Planted(
        f"{name}:{line.number} {mutation.kind}",
        GENERATED,
        device,
        Edit(name, mutation.before, mutation.after, line.occurrence),
        f"{mutation.before} → {mutation.after}",
        checks.for_generated(name, device, root),
        own=checks.own_tests(name, root),
    )


def load_equivalents(path: Path = EQUIVALENT_PATH) -> tuple[Equivalent, ...]:
    """Reads the list.

    Raises:
        CatalogueError: an entry has unknown or missing fields, or no reason.
    """
    return tuple(Equivalent(*each) for each in _listed(path, "equivalent", "reason"))


def load_survivors(path: Path = SURVIVOR_PATH) -> tuple[Survivor, ...]:
    """Reads the list of those that are known to live.

    Raises:
        CatalogueError: an entry has unknown or missing fields, or nothing that would kill it.
    """
    return tuple(Survivor(*each) for each in _listed(path, "survivor", "needs"))


def _listed(path: Path, kind: str, words: str) -> Iterator[tuple[Edit, str]]:
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get(kind, []):
        if set(entry) - {"occurrence"} != {"file", "before", "after", words}:
            raise CatalogueError(f"{kind} {entry.get('before')!r}: wrong fields")
        if len(entry[words].split()) < 3:
            raise CatalogueError(f"{kind} {entry['before']!r}: no {words}")
        place = entry.get("occurrence", 0)
        yield Edit(entry["file"], entry["before"], entry["after"], place), entry[words]


def with_equivalents(
    planted: list[Planted], equivalents: tuple[Equivalent, ...], root: Path, device: str
) -> list[Planted]:
    """The sample and, after it, every listed equivalent of this device that it does not hold."""
    edits = {each.edit for each in planted}
    mine = sources(root, device)
    extra = [e.edit for e in equivalents if e.edit not in edits and e.edit.file in mine]
    return planted + [
        Planted(
            f"{edit.file} equivalent {index}",
            GENERATED,
            device,
            edit,
            f"{edit.before} → {edit.after}",
            checks.for_generated(edit.file, device, root),
            own=checks.own_tests(edit.file, root),
        )
        for index, edit in enumerate(extra, start=1)
    ]


def _python_lines(text: str) -> Iterator[Line]:
    by_row: dict[int, list[Mutation]] = {}
    for row, mutation in mutations_of(text):
        by_row.setdefault(row, []).append(mutation)
    stripped = [line.strip() for line in text.split("\n")]
    for row, found in sorted(by_row.items()):
        yield Line(row + 1, stripped[:row].count(stripped[row]), tuple(found))


def _numbers(text: str) -> dict[tuple[str, int], int]:
    """Line numbers by stripped line and the count of equal ones before it."""
    numbers: dict[tuple[str, int], int] = {}
    seen: dict[str, int] = {}
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        numbers[line, seen.get(line, 0)] = number
        seen[line] = seen.get(line, 0) + 1
    return numbers
