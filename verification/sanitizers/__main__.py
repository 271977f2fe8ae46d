"""The command `make sanitize`: builds what is planted, runs the four lanes side by side, reports.

Knows where tools and programs are and writes build/sanitize.json; decides no lane's verdict. Exit
status: 0 every lane passes, 1 one does not, 130 interrupted.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.bindings import LIBRARY_PATH
from verification.gpu_record import gpu_source_stamp
from verification.interrupts import ends_in_one_line
from verification.sanitizers.coverage import LISTING, Coverage, coverage, kernels_listed
from verification.sanitizers.findings import OpcodeAt
from verification.sanitizers.lanes import LANES, Lane, LaneResult, run_lane, sass_opcodes
from verification.sanitizers.process import Processes, Sanitizer
from verification.sanitizers.translation import translate
from verification.sanitizers.workload import PARTS

ROOT = Path(__file__).resolve().parents[2]
PLANTED = ROOT / "tests" / "kernels" / "planted"
OUTPUT = ROOT / "build" / "sanitize.json"
LOGS = ROOT / "build" / "sanitizers"  # each report as the tool printed it
TOOLKIT = Path("/usr/local/cuda/bin")  # where it is when it is not in PATH
WORKLOAD = (sys.executable, "-m", "verification.sanitizers.workload")
LAUNCHES = (sys.executable, "-m", "verification.sanitizers.launches")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: beside nvcc, in PATH, or where toolkits are installed."""
    beside = Path(os.environ.get("NVCC") or "nvcc").parent / name
    found = shutil.which(str(beside)) or shutil.which(name) or shutil.which(str(TOOLKIT / name))
    return found


def build_planted(nvcc: str, target: Path) -> dict[str, Path]:
    """Compiles every planted program; by name."""
    target.mkdir(parents=True, exist_ok=True)
    programs = {source.stem: target / source.stem for source in sorted(PLANTED.glob("*.cu"))}
    flags = ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc' / 'common'}"]

    def compile_one(name: str) -> None:
        source = str(PLANTED / f"{name}.cu")
        subprocess.run([nvcc, *flags, "-o", str(programs[name]), source], check=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, programs))
    return programs


def show(result: LaneResult) -> list[str]:
    """A lane's lines: what ran, what was found, what was counted as the tool's limit."""
    limits = sum(result.limits.values())
    lines = [
        f"{result.tool:<10} {result.status}  {result.cases} cases, "
        f"{sum(result.findings.values())} findings, {limits} of the tool's limit, "
        f"{result.seconds:.0f} s",
        f"  ran compute-sanitizer --tool {result.command}",
    ]
    lines += [f"  problem: {problem}" for problem in result.problems]
    for mode, kinds in result.controls.items():
        lines += [f"  control {mode}: {n} x {kind}" for kind, n in kinds.items()]
        lines += [] if kinds else [f"  control {mode}: nothing reported"]
    lines += [f"  tool limit, as in a control: {n} x {kind}" for kind, n in result.limits.items()]
    lines += [
        f"  not where the barrier is an mbarrier: {n} x {kind}"
        for kind, n in result.of_form.items()
    ]
    return lines


@ends_in_one_line("no lane was judged and nothing was written")
def main() -> int:
    """The command; see the module."""
    found = {name: tool(name) for name in ("compute-sanitizer", "nvcc", "cuobjdump", "c++filt")}
    if missing := [name for name, path in found.items() if path is None]:
        print(f"error: {', '.join(missing)} of the CUDA toolkit not found: no lane ran")
        return 1
    source, began = gpu_source_stamp(), time.monotonic()
    planted = build_planted(found["nvcc"], ROOT / "build" / "planted")
    programs = [LIBRARY_PATH, *planted.values()]
    opcode_at = sass_opcodes(programs, found["cuobjdump"], found["c++filt"])
    LOGS.mkdir(parents=True, exist_ok=True)
    processes = Processes()
    run = Sanitizer(found["compute-sanitizer"], LOGS, processes)

    def covered() -> Coverage:
        listing = processes.output(found["cuobjdump"], *LISTING, str(LIBRARY_PATH))
        names = processes.output(found["c++filt"], *kernels_listed(listing))
        launches = processes.output(*LAUNCHES, *PARTS)
        return coverage(names.splitlines(), launches.splitlines())

    scratch = TemporaryDirectory(prefix="touchstone-sanitizers-")

    def translated() -> tuple[Sequence[str], OpcodeAt]:
        folder = Path(scratch.name) / "translated"
        library = translate(ROOT, folder, found["nvcc"], processes.output)
        opcode_at = sass_opcodes([library], found["cuobjdump"], found["c++filt"])
        return ("--library", str(library)), opcode_at

    with scratch, ThreadPoolExecutor() as pool:  # the lanes share the card: wall time is the limit
        try:
            kernels, other = pool.submit(covered), pool.submit(translated)

            def lane_result(lane: Lane) -> LaneResult:
                return run_lane(lane, run, planted, WORKLOAD, PARTS, opcode_at, other.result)

            results = list(pool.map(lane_result, LANES))
            ran = kernels.result()
        except KeyboardInterrupt:
            processes.stop()  # else the pool would wait for the tools' time limits
            raise
    version = processes.output(found["compute-sanitizer"], "--version")
    report = {
        "status": "pass",
        "gpu_source": source,
        "version": version.strip().splitlines()[-1],
        "coverage": ran.to_json(),
        "lanes": {result.tool: result.to_json() for result in results},
        "seconds": round(time.monotonic() - began, 1),
    }
    if ran.problems or any(result.status != "pass" for result in results):
        report["status"] = "fail"
    OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
    for result in results:
        print("\n".join(show(result)))
    print(f"{len(ran.kernels & ran.run)} of the library's {len(ran.kernels)} kernels run")
    print("\n".join(f"  problem: {problem}" for problem in ran.problems))
    print(report["version"])
    print(f"{report['status']}, {report['seconds']:.0f} s")
    return 0 if report["status"] == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
