"""Runs one lane: first the planted kernel that it must catch, then every kernel of the engine.

Decides a lane's verdict. racecheck alone has controls: correct kernels that order bulk copies by
mbarriers. What it reports of those it cannot follow, so findings of that very kind (a race between
the same two instructions) are counted apart as the tool's limit; so are those of a kernel that a
library with its barriers in another form (`translation`) does not show. Anything else is a finding.
Invariant: a lane passes only if it caught its planted kernel, ran every case and read every
finding.
"""

import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from engine.errors import EngineError
from verification.sanitizers.coverage import plain_name
from verification.sanitizers.findings import Kind, OpcodeAt, Report, read_report
from verification.sanitizers.translation import KERNELS

BARRIERS = ("--num-cuda-barriers", "256")  # the fused step initialises 66; the tool tracks 16 else


@dataclass(frozen=True)
class Lane:
    """One tool.

    Args:
        tool: of compute-sanitizer.
        arguments: its own.
        planted: the kernel of tests/kernels/planted with the defect that it is for.
        says: what it must say of that kernel, a pattern.
        controls: modes of CONTROLS, each a correct kernel.
        wrong: modes whose kernel is not, so that the tool must report it.
        is_apart: whether each part of the workload is a process of its own, for a tool that takes
            long.
        without: parts that this lane leaves out; no kernel is run by them alone.
        translated: kernels of which the translated library is asked too.
    """

    tool: str
    planted: str
    says: str
    arguments: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    is_apart: bool = False
    without: tuple[str, ...] = ()
    translated: tuple[str, ...] = ()


BULK_COPIES = ("once", "ring", "arrive", "plain", "lanes", "patch", "init")
NAMED_BARRIERS = ("meet", "announce", "tile", "tile-announce")
# mode -> the program of tests/kernels/planted
CONTROLS = {
    **dict.fromkeys((*BULK_COPIES, "unordered"), "bulk_copy_control"),
    **dict.fromkeys((*NAMED_BARRIERS, "apart", "tile-apart"), "named_barrier_control"),
}
LANES = (
    Lane("memcheck", "out_of_bounds", "Invalid __global__ write"),
    Lane(
        "racecheck",
        "missing_barrier",
        "Race reported",
        BARRIERS,
        controls=(*BULK_COPIES, *NAMED_BARRIERS),
        wrong=("unordered", "apart", "tile-apart"),
        is_apart=True,
        without=("toy", "toy-untied"),
        translated=KERNELS,
    ),
    Lane("initcheck", "never_written", "Uninitialized __global__ memory read"),
    Lane("synccheck", "divergent_barrier", "Barrier error detected", BARRIERS),
)


@dataclass
class LaneResult:
    """What a lane found; fails for each of its problems.

    Args:
        command: what ran over the workload.
        problems: why it does not pass.
        findings: kind -> how many, of the workload.
        limits: the same, of kinds that the correct controls show too.
        of_form: the same, of kinds that go with the form of a barrier.
        controls: control -> kind -> how many.
    """

    tool: str
    command: str = ""
    cases: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    findings: dict[Kind, int] = field(default_factory=dict)
    limits: dict[Kind, int] = field(default_factory=dict)
    of_form: dict[Kind, int] = field(default_factory=dict)
    controls: dict[str, dict[Kind, int]] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """Verdict."""
        return "fail" if self.problems else "pass"

    def to_json(self) -> dict:
        """As a dict of build/sanitize.json."""
        return {
            "status": self.status,
            "problems": self.problems,
            "command": self.command,
            "cases": self.cases,
            "findings": _named(self.findings),
            "tool_limits": _named(self.limits),
            "barrier_form": _named(self.of_form),
            "controls": {name: _named(kinds) for name, kinds in self.controls.items()},
            "seconds": round(self.seconds, 1),
        }


# (tool, its arguments, the program) -> exit status and output
Run = Callable[[str, Sequence[str], Sequence[str]], tuple[int, str]]
# builds the translated library: the words that follow the workload, and its instructions
Translate = Callable[[], tuple[Sequence[str], OpcodeAt]]


def run_lane(
    lane: Lane,
    run: Run,
    planted: Mapping[str, Path],
    workload: Sequence[str],
    parts: Sequence[str],
    opcode_at: OpcodeAt,
    translate: Translate | None = None,
) -> LaneResult:
    """Runs one lane, everything of it side by side; then what needs a second opinion.

    Args:
        lane: the tool and what it must catch.
        run: runs a program under a tool.
        planted: the built programs by name.
        workload: the program that runs every kernel, given some of `parts`.
        parts: of the workload.
        opcode_at: the instruction at a place of a kernel, for races.
        translate: called where a finding is of a kernel that has a translation.
    """
    began = time.monotonic()
    parts = [part for part in parts if part not in lane.without]
    result = LaneResult(lane.tool, " ".join([lane.tool, *lane.arguments, *workload, *parts]))
    modes = (*lane.controls, *lane.wrong)
    groups = [(part,) for part in parts] if lane.is_apart else [tuple(parts)]
    programs = [
        [str(planted[lane.planted])],
        *([str(planted[CONTROLS[mode]]), mode] for mode in modes),
        *([*workload, *group] for group in groups),
    ]
    with ThreadPoolExecutor(len(programs)) as pool:
        outcomes = list(pool.map(lambda words: run(lane.tool, lane.arguments, words), programs))
    (_, said), of_modes, of_groups = (
        outcomes[0],
        outcomes[1:][: len(modes)],
        outcomes[-len(groups) :],
    )
    if not re.search(lane.says, said) or not read_report(said).total:
        result.problems.append(f"does not catch planted {lane.planted}: {_last(said)}")
    for mode, (status, said) in zip(modes, of_modes, strict=True):
        report = read_report(said, opcode_at)
        result.controls[mode] = report.kinds
        if (status and mode in lane.controls) or report.total is None:
            result.problems.append(f"control {mode} does not run: {_last(said)}")
        elif mode in lane.wrong and not report.total:
            result.problems.append(f"does not catch {mode} of {CONTROLS[mode]}")
    doubtful: dict[str, int] = {}  # part -> how many cases ran
    for group, (status, said) in zip(groups, of_groups, strict=True):
        part, before = ", ".join(group), result.cases
        report = read_report(said, opcode_at)
        _judge(result, part, status, said, report, lane.controls)
        if any(kind.function in lane.translated for kind in report.kinds):
            doubtful[part] = result.cases - before
    if translate and any(kind.function in lane.translated for kind in result.findings):
        _ask_again(result, lane, run, workload, doubtful, translate)
    result.problems += [f"{count} x {kind}" for kind, count in result.findings.items()]
    result.seconds = time.monotonic() - began
    return result


def _judge(
    result: LaneResult,
    part: str,
    status: int,
    said: str,
    report: Report,
    controls: Sequence[str],
) -> None:
    ran = re.search(r"^(\d+) cases ran$", said, re.M)
    result.cases += int(ran[1]) if ran else 0
    if status or not ran or ran[1] == "0" or report.total is None:
        result.problems.append(f"{part} did not end, exit status {status}: {_last(said)}")
        return
    if report.total != sum(report.kinds.values()):
        read = sum(report.kinds.values())
        result.problems.append(f"{part}: {report.total} findings by the summary, {read} read")
    known = _known_pairs(result, controls)
    for kind, count in report.kinds.items():
        excused = kind.pairs and all(_is_exact(pair) and pair in known for pair in kind.pairs)
        counts = result.limits if excused else result.findings
        counts[kind] = counts.get(kind, 0) + count


def _known_pairs(result: LaneResult, controls: Sequence[str]) -> set[str]:
    """Accesses that the tool reports of correct controls."""
    return {pair for mode in controls for kind in result.controls[mode] for pair in kind.pairs}


def _ask_again(
    result: LaneResult,
    lane: Lane,
    run: Run,
    workload: Sequence[str],
    doubtful: Mapping[str, int],
    translate: Translate,
) -> None:
    """Counts apart what the translated library does not show in the same cases.

    Args:
        doubtful: parts in which a kernel with a translation was reported, with their cases.
    """
    try:
        words, opcode_at = translate()
    except EngineError as error:
        result.problems.append(f"no second opinion: {error}")
        return
    programs = [[*workload, *words, part] for part in doubtful]
    with ThreadPoolExecutor(len(programs)) as pool:
        outcomes = list(pool.map(lambda each: run(lane.tool, lane.arguments, each), programs))
    known, shown = _known_pairs(result, lane.controls), set()
    for (part, cases), (status, said) in zip(doubtful.items(), outcomes, strict=True):
        report = read_report(said, opcode_at)
        ran = re.search(r"^(\d+) cases ran$", said, re.M)
        is_whole = report.total is not None and report.total == sum(report.kinds.values())
        if status or not ran or int(ran[1]) != cases or not is_whole:
            result.problems.append(f"{part}, translated, did not end: {_last(said)}")
            return
        for kind in report.kinds:
            if not kind.pairs or not all(map(_is_exact, kind.pairs)):
                result.problems.append(f"{part}, translated: {kind}")
                return
            shown |= {(kind.function, pair) for pair in kind.pairs}
    for kind in list(result.findings):
        doubted = {(kind.function, pair) for pair in kind.pairs if pair not in known}
        is_named = kind.pairs and all(map(_is_exact, kind.pairs))
        if kind.function in lane.translated and is_named and not doubted & shown:
            result.of_form[kind] = result.findings.pop(kind)


def _is_exact(pair: str) -> bool:
    """Whether both accesses are known by their instruction: "Read LDSM with Write UBLKCP"."""
    return all(" " in side for side in pair.split(" with "))


def sass_opcodes(paths: Sequence[Path], cuobjdump: str, demangler: str) -> OpcodeAt:
    """Instructions by kernel and offset; disassembled aside, beginning now."""

    def disassembled(path: Path) -> dict[str, dict[int, str]]:
        command = [cuobjdump, "--dump-sass", str(path)]
        code = read_sass(subprocess.run(command, capture_output=True, text=True).stdout)
        names = subprocess.run([demangler, *code], capture_output=True, text=True).stdout
        return dict(zip(names.splitlines(), code.values(), strict=False))

    pool = ThreadPoolExecutor()
    pending = [pool.submit(disassembled, path) for path in paths]
    pool.shutdown(wait=False)

    @cache
    def opcodes() -> OpcodeAt:
        return opcodes_of([listing for future in pending for listing in future.result().items()])

    return lambda function, offset: opcodes()(function, offset)


def opcodes_of(listings: Sequence[tuple[str, dict[int, str]]]) -> OpcodeAt:
    """The instruction at an offset of a kernel, by listings of C++ names; None where they differ.

    A template's instances are kernels of their own: other code lies at the same offset.
    """

    def opcode_at(function: str, offset: int) -> str | None:
        wanted = plain_name(function)
        there = {
            code[offset] for name, code in listings if plain_name(name) == wanted and offset in code
        }
        return there.pop() if len(there) == 1 else None

    return opcode_at


def read_sass(text: str) -> dict[str, dict[int, str]]:
    """The listing of cuobjdump: function -> offset -> opcode without its modifiers."""
    functions: dict[str, dict[int, str]] = {}
    code: dict[int, str] = {}
    line_form = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
    for line in text.splitlines():
        if "Function :" in line:
            code = functions.setdefault(line.partition(":")[2].strip(), {})
        elif found := line_form.match(line):
            code[int(found[1], 16)] = found[2]
    return functions


def _named(kinds: Mapping[Kind, int]) -> dict[str, int]:
    return {str(kind): count for kind, count in kinds.items()}


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip(" =")]
    return lines[-1].strip() if lines else "it printed nothing"
