"""The tests that need a GPU, for its record: runs them in processes side by side and counts.

Decides what is a pass: every test run, none skipped, none failed. Knows pytest and its reports;
knows nothing of records.
"""

import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# One process each: whole models, which keep every core busy; then
# two of about equal time; last what does not need the twin.
KERNEL_TESTS = ("models or many_sequences", "attention or decode_step or bits_step or repeats")
GPU_TESTS = (
    ("tests/kernels", "-k", KERNEL_TESTS[0]),
    ("tests/kernels", "-k", f"not ({KERNEL_TESTS[0]}) and ({KERNEL_TESTS[1]})"),
    ("tests/kernels", "-k", f"not ({' or '.join(KERNEL_TESTS)})"),
    ("tests/system", "tests/runtime"),
)
PASSED, FAILED = 0, 1  # pytest's exit status; with any other not every test was run


class KernelTests:
    """What is marked gpu; one thread runs it, another may stop it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._is_stopped = False

    def run(self, directory: Path) -> dict:
        """The counts of all; a skipped test is counted, and one is enough not to pass.

        Args:
            directory: for the reports and what pytest says; made if missing.
        """
        directory.mkdir(exist_ok=True)
        reports = [directory / f"kernel_tests_{i}.xml" for i in range(len(GPU_TESTS))]
        with ThreadPoolExecutor(len(GPU_TESTS)) as pool:
            ended = list(pool.map(self._pytest, GPU_TESTS, reports))
        for words, report, (status, last) in zip(GPU_TESTS, reports, ended, strict=True):
            # What was interrupted leaves a report too, of the tests until then.
            if status not in (PASSED, FAILED) or not report.exists():
                return {"status": "not run", "reason": f"pytest ended with status {status}: {last}"}
            print(f"  tests: {words[-1]}: {last}", flush=True)
        return count_tests([report.read_text(encoding="utf-8") for report in reports])

    def stop(self) -> None:
        """Ends what runs and lets nothing more begin."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                process.terminate()

    def _pytest(self, words: Sequence[str], report: Path) -> tuple[int | None, str]:
        """The exit status, None where it was stopped before, and the last line that it said."""
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", *words, "-m", "gpu", "--durations=9"]
        command.append(f"--junitxml={report}")
        with self._lock:
            if self._is_stopped:
                return None, "stopped"
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            self._running.add(process)
        said, _ = process.communicate()
        with self._lock:
            self._running.remove(process)
        report.with_suffix(".log").write_text(said, encoding="utf-8")
        return process.returncode, (said.strip().splitlines() or ["nothing"])[-1]


def count_tests(junit_xmls: Iterable[str]) -> dict:
    """The counts of JUnit reports; "pass" only if every test passed and each report has one."""
    roots = [ElementTree.fromstring(text) for text in junit_xmls]
    suites = [list(root.iter("testsuite")) for root in roots]
    total, failed, skipped = (
        sum(int(suite.get(key, 0)) for of in suites for suite in of for key in keys)
        for keys in (("tests",), ("failures", "errors"), ("skipped",))
    )
    is_whole = all(any(int(suite.get("tests", 0)) for suite in of) for of in suites)
    passed = total - failed - skipped
    status = "fail" if failed else "pass" if passed == total and is_whole else "not run"
    counts = {"num_tests": total, "passed": passed, "failed": failed, "skipped": skipped}
    reason = {"reason": f"{skipped} of {total} tests skipped"} if status == "not run" else {}
    seconds = round(sum(float(suite.get("time", 0)) for of in suites for suite in of), 1)
    cases = (case for root in roots for case in root.iter("testcase"))
    files = Counter(_file_of(case.get("classname", "")) for case in cases)
    return {"status": status, **reason, **counts, "seconds": seconds, "files": dict(files)}


def _file_of(classname: str) -> str:
    """The test's file without its suffix: tests.kernels.test_x.TestY -> tests/kernels/test_x."""
    words = classname.split(".")
    return "/".join(word for word in words if not word.startswith("Test"))
