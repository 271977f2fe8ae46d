import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from verification import kernel_tests
from verification.kernel_tests import KernelTests, count_tests


class TestCounting:
    def xml(self, tests: int, failures: int = 0, errors: int = 0, skipped: int = 0) -> str:
        counts = f'tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}"'
        case = '<testcase classname="tests.kernels.test_x.TestY" name="z"/>'
        return (
            f'<testsuites><testsuite {counts} time="1.25">{tests * case}</testsuite></testsuites>'
        )

    def test_all_passed_is_a_pass(self):
        assert count_tests([self.xml(5)]) == {
            "status": "pass",
            "num_tests": 5,
            "passed": 5,
            "failed": 0,
            "skipped": 0,
            "seconds": 1.2,
            "files": {"tests/kernels/test_x": 5},
        }

    def test_the_reports_of_several_runs_are_added_up(self):
        both = count_tests([self.xml(5), self.xml(3, failures=1)])

        assert (both["status"], both["num_tests"], both["failed"]) == ("fail", 8, 1)
        assert both["files"] == {"tests/kernels/test_x": 8}

    @pytest.mark.parametrize("counts", [(5, 1), (5, 0, 1), (5, 1, 0, 4)])
    def test_one_failure_or_error_fails(self, counts):
        assert count_tests([self.xml(*counts)])["status"] == "fail"

    @pytest.mark.parametrize("counts", [(5, 0, 0, 1), (5, 0, 0, 5), (0,)])
    def test_a_skip_or_nothing_at_all_is_never_a_pass(self, counts):
        assert count_tests([self.xml(*counts)])["status"] == "not run"
        assert count_tests([self.xml(3), self.xml(*counts)])["status"] == "not run"


def test_the_processes_share_the_kernel_tests_without_a_gap():
    one, two = (f"({words})" for words in kernel_tests.KERNEL_TESTS)
    chosen = [words[2] for words in kernel_tests.GPU_TESTS if words[0] == "tests/kernels"]

    # With A and B the two expressions: A; not A and B; not (A or B).
    assert chosen == [one[1:-1], f"not {one} and {two}", f"not ({one[1:-1]} or {two[1:-1]})"]


def test_every_test_marked_gpu_is_run_for_the_record():
    words = {word for words in kernel_tests.GPU_TESTS for word in words}
    folders = {word for word in words if word.startswith("tests/")}
    root = Path(kernel_tests.ROOT)
    marked = {
        path.relative_to(root)
        for path in (root / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8") and path != Path(__file__)
    }

    missed = {path for path in marked if not any(Path(f) in (path, *path.parents) for f in folders)}

    assert all((root / folder).exists() for folder in folders)
    assert missed == {  # the record's other parts
        Path("tests/benchmarks/test_bench_gpu.py"),
        Path("tests/verification/sanitizers/test_races.py"),
    }


def one_test_file(tmp_path: Path, monkeypatch, body: str) -> None:
    """Puts a file of one test marked gpu in place of the GPU's tests."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    imports = "import os, pathlib, pytest, signal, time\npytestmark = pytest.mark.gpu\n"
    (tmp_path / "test_it.py").write_text(f"{imports}def test_first(): pass\n{body}")
    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_tests, "GPU_TESTS", (("test_it.py",),))


def test_a_run_of_the_kernel_tests_that_ends_is_counted(tmp_path: Path, monkeypatch):
    one_test_file(tmp_path, monkeypatch, "")

    found = KernelTests().run(tmp_path)

    assert (found["status"], found["passed"]) == ("pass", 1)


def test_a_run_of_the_kernel_tests_that_was_interrupted_is_no_pass(tmp_path: Path, monkeypatch):
    # pytest writes a report of the tests before the interruption: all of them passed
    one_test_file(
        tmp_path,
        monkeypatch,
        "def test_second():\n"
        # whoever starts this suite in the background of a shell has the signal ignored
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n",
    )

    found = KernelTests().run(tmp_path)

    assert found["status"] == "not run" and "pytest ended with status 2" in found["reason"]


def test_what_is_stopped_ends_at_once_and_is_no_pass(tmp_path: Path, monkeypatch):
    begun = tmp_path / "begun"
    one_test_file(
        tmp_path,
        monkeypatch,
        f"def test_second():\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(600)\n",
    )
    tests = KernelTests()
    with ThreadPoolExecutor(1) as aside:
        found = aside.submit(tests.run, tmp_path)
        while not begun.exists() and not found.done():
            time.sleep(0.05)
        tests.stop()

        assert found.result()["status"] == "not run"
        assert tests.run(tmp_path)["reason"] == "pytest ended with status None: stopped"
