import subprocess
import sys

import pytest

from tests.tree import ROOT

GENERATE = "-m engine generate --model toy --device cpu --max-tokens 2"


def run(words: str, closed: str) -> subprocess.CompletedProcess:
    """A command of Python's, with a standard stream closed as a shell does it."""
    command = f"exec '{sys.executable}' {words} {closed}"
    return subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)


def test_an_answer_without_a_standard_output_goes_nowhere():
    found = run(f"{GENERATE} hi", ">&-")

    assert (found.returncode, found.stdout) == (0, "")
    assert found.stderr.startswith("[cpu] prefill 2 tokens")


def test_rates_without_a_standard_error_are_not_mixed_with_the_answer():
    found = run(f"{GENERATE} hi", "2>&-")

    assert found.returncode == 0
    assert "prefill" not in found.stdout


def test_a_prompt_from_a_closed_standard_input_is_empty_and_refused():
    found = run(f"{GENERATE} -", "<&-")

    assert found.returncode == 1
    assert found.stderr == "error: prompt must have at least 1 character, got 0\n"


@pytest.mark.parametrize("module", ["verification", "verification.record"])
def test_a_command_of_the_suite_runs_without_a_standard_output(module: str):
    found = run(f"-m {module} --model README.md", ">&-")

    assert "Traceback" not in found.stderr
    assert found.returncode == 1
