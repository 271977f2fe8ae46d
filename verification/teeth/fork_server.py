"""Runs checks on planted trees, each in a process of its own that starts warm.

A script, not a module of the package: it imports what every check needs from outside this project
(torch, transformers, pytest) once, then reads one request per line and forks a child for it, whose
project code comes from the tree under test alone. What crashes, hangs or never returns is therefore
an answer like any other. Knows trees and checks; knows nothing of faults.

Arguments the core it is bound to, and "torch" where a check may want that.
Request   {"tree", "pristine", "check": {"kind": a key of CHECKS, ...}, "cpu", "phase"}: seconds
          of processor for all of it, and for one test where that is limited, else null
Answer    {"status": "killed" | "alive" | "broken", "by", "why", "named", "levels", "seconds",
           "cpu"}, of tests that passed also "phase", the longest one's seconds of processor
"""

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path

GRACE_SECONDS = 2  # between the processor limit's polite signal and its end
# Without any use of a processor: waits for ever. No wall clock: on a busy machine it would kill the
# innocent.
IDLE_SECONDS = 60
LOOK_SECONDS = 5
FINDS = "--hypothesis-profile=mutants"  # finds, does not shrink
MOST_CASES = 4  # of each test of a property
MOST_GPU_CASES = 12  # of each test that holds kernels to the twin
MOST_GPU_FIXTURES = 4  # models and the like that are made once for a file's tests
TOO_LARGE = "llama-3.2-1b-shape"  # toys alone: every process would load its 2.5 GB
NO_TESTS = 5  # pytest's exit status where the marks leave none


def main() -> None:
    """Serves until its input ends."""
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    core, shared = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    os.environ["OMP_NUM_THREADS"] = "1"
    _import_what_is_shared(shared == "torch")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing else may write into the answers
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_in_a_child(json.loads(line))) + "\n")
        answers.flush()


def _import_what_is_shared(has_torch: bool) -> None:
    import _pytest.assertion.rewrite  # noqa: F401
    import hypothesis.extra.numpy  # noqa: F401
    import hypothesis.stateful  # noqa: F401
    import pytest  # noqa: F401
    import rich.table  # noqa: F401
    import safetensors  # noqa: F401
    import tokenizers  # noqa: F401

    # Never where kernels are asked: a process that has seen the device may not fork.
    if not has_torch:
        return
    import safetensors.torch  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)


def _in_a_child(request: dict) -> dict:
    clock = time.monotonic()
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _child(request, theirs)
    os.close(theirs)
    signal.signal(signal.SIGTERM, lambda *_: _leave_without(child))
    text, ran_out = _read_all(ours, child)
    if ran_out:
        os.killpg(child, signal.SIGKILL)
    os.close(ours)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _, status, used = os.wait4(child, 0)
    answer = {"status": "broken", "by": "", "why": "", "named": None, "levels": []}
    if text.endswith("}"):
        answer |= json.loads(text)
    elif ran_out:
        answer |= {"status": "killed", "by": "limit", "why": f"waited {IDLE_SECONDS} s for nothing"}
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        words = signal.strsignal(number) or f"signal {number}"
        answer |= {"status": "killed", "by": "crash", "why": words}
    else:
        answer |= {"why": f"left with status {os.waitstatus_to_exitcode(status)} and no answer"}
    cpu = used.ru_utime + used.ru_stime
    return answer | {"seconds": round(time.monotonic() - clock, 2), "cpu": round(cpu, 2)}


def _leave_without(child: int) -> None:
    """The run was stopped: nobody waits for this answer."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os._exit(0)


def _read_all(pipe: int, child: int) -> tuple[str, bool]:
    """What a child writes until it ends; and whether it stopped doing anything instead."""
    text, used, idle = b"", -1.0, 0.0
    while idle <= IDLE_SECONDS:
        if select.select([pipe], [], [], LOOK_SECONDS)[0]:
            piece = os.read(pipe, 65536)
            if not piece:
                return text.decode(), False
            text += piece
            continue
        is_used = _ticks_of_group(child)
        # Looks are counted, not the clock's seconds: a run that was suspended waited for nothing.
        idle = 0.0 if is_used != used else idle + LOOK_SECONDS
        used = is_used
    return text.decode(), True


def _ticks_of_group(group: int) -> float:
    """Processor time of all processes of a group, those they have waited for included."""
    total = 0
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group:
            total += sum(map(int, fields[11:15]))
    return total


def _child(request: dict, pipe: int) -> None:
    """Runs the check and leaves; never returns."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    cpu = request["cpu"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + GRACE_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(request["tree"])
    sys.path.insert(0, request["tree"])
    try:
        check = dict(request["check"])
        answer = CHECKS[check.pop("kind")](request, **check)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {error} ({os.path.basename(last.filename)}:{last.lineno})"
        answer = {"status": "killed", "by": "error", "why": why[:400]}
    os.write(pipe, json.dumps(answer).encode())
    os._exit(0)


def _verify(request: dict, model: str, prompts: str) -> dict:
    """The suite against transformers, as make verify runs it."""
    from engine.bindings import Library
    from verification.mutants.judge import Judge

    named = Judge(Library()).verify(None, (model, prompts))
    return _answer(named, "verify")


def _bits(request: dict, model: str, prompts: str) -> dict:
    """Every tap's bits against those of the tree without a fault."""
    from pathlib import Path

    from engine.bindings import Library
    from engine.source_stamp import source_stamp
    from verification.mutants.judge import Judge

    root = Path(request["pristine"])
    pristine = Library(root / "engine" / "libengine.so", source_stamp(root / "csrc"))
    named = Judge(pristine).bits(Library(), (model, prompts))
    return _answer(named, "bits")


def _answer(named: object, by: str) -> dict:
    if named is None:
        return {"status": "alive", "by": by}
    place = [named.operator, named.tap, named.layer]
    levels = list(named.levels) or ["system"]
    why = named.message[:300]
    return {"status": "killed", "by": by, "why": why, "named": place, "levels": levels}


def _tests(request: dict, tests: list[str], marks: str) -> dict:
    """Some of the tree's own tests, up to the first that fails; on a GPU none may be skipped."""
    import pytest

    is_gpu = marks.startswith("gpu")
    if is_gpu:
        from verification.teeth.remembered import Memory, remember_the_twin

        remember_the_twin(Memory(Path(request["pristine"]) / "build" / "twin_answers"))
    phases = _Phases(request["phase"])

    class Recorder:
        passed, skipped, failed, why = 0, 0, "", ""

        def pytest_collection_modifyitems(self, items):
            if is_gpu:  # the twin computes what is expected: all cases take minutes of one core
                from verification.teeth.cases import a_few_of_each, of_few_fixtures

                mine = [item for item in items if TOO_LARGE not in item.nodeid]
                items[:] = a_few_of_each(of_few_fixtures(mine, MOST_GPU_FIXTURES), MOST_GPU_CASES)

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_setup(self):
            phases.begin()

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_call(self):
            phases.begin()

        def pytest_runtest_logreport(self, report):
            if report.failed and not self.failed:
                self.failed, self.why = report.nodeid, _last_line(report)
            self.passed += report.when == "call" and report.passed
            self.skipped += report.skipped

        def pytest_collectreport(self, report):
            if report.failed and not self.failed:
                self.failed, self.why = f"{report.nodeid} (import)", _last_line(report)

    recorder = Recorder()
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", marks, FINDS]
    status = pytest.main([*options, f"--rootdir={request['tree']}", *tests], plugins=[recorder])
    if recorder.failed:
        return {"status": "killed", "by": recorder.failed, "why": recorder.why[:300]}
    if status in (0, NO_TESTS) and not (recorder.skipped and is_gpu):
        by = "tests" if recorder.passed else "no test of these marks"
        return {"status": "alive", "by": by, "phase": phases.longest()}
    counts = f"{recorder.passed} passed, {recorder.skipped} skipped"
    return {"status": "broken", "why": f"pytest left with {int(status)}, {counts}"}


class _Phases:
    """The processor time of each test and of what it sets up; one that takes too long is ended.

    Who waits for a device that hangs uses a processor all the while.

    Args:
        limit: seconds; None: only all of them together are limited.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit, self._start, self._longest = limit, self._used(), 0.0

    def begin(self) -> None:
        used = self._used()
        self._longest, self._start = max(self._longest, used - self._start), used
        if self._limit is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (min(int(used + self._limit), hard), hard))

    def longest(self) -> float:
        """Seconds of the longest until now."""
        self.begin()
        return round(self._longest, 2)

    def _used(self) -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime


def _properties(request: dict, tests: list[str]) -> dict:
    """Some tests, a few cases of each, and all of them that fail."""
    import pytest

    from verification.teeth.cases import a_few_of_each

    class Chooser:
        passed, failed = 0, set()

        def pytest_collection_modifyitems(self, items):
            mine = [item for item in items if _bare(item.nodeid) in tests]
            items[:] = a_few_of_each(mine, MOST_CASES)

        def pytest_runtest_logreport(self, report):
            self.passed += report.when == "call" and report.passed
            if report.failed:
                self.failed.add(_bare(report.nodeid))

    chooser = Chooser()
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-m", "not slow and not gpu", FINDS]
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    status = pytest.main([*options, f"--rootdir={request['tree']}", *files], plugins=[chooser])
    if chooser.failed:
        return {"status": "killed", "by": "properties", "levels": sorted(chooser.failed)}
    if status == 0 and chooser.passed:
        return {"status": "alive", "by": "properties"}
    if status == 2:  # nothing could be collected: the tree does not even import
        return {"status": "killed", "by": "import"}
    return {"status": "broken", "why": f"pytest left with {int(status)}, {chooser.passed} passed"}


def _bare(nodeid: str) -> str:
    """A test's file and function, without its class and its parameters."""
    path, *names = nodeid.partition("[")[0].split("::")
    return f"{path}::{names[-1]}"


def _last_line(report: object) -> str:
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return lines[0][2:].strip() if lines else str(report.longrepr).strip().splitlines()[-1]


CHECKS = {"verify": _verify, "bits": _bits, "tests": _tests, "properties": _properties}

if __name__ == "__main__":
    main()
