"""Ctrl-C before a command runs, and in the middle of a change."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.interrupts import Uninterrupted
from tests.tree import ROOT


@pytest.fixture
def python_hears_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("python_hears_ctrl_c")
class TestUninterrupted:
    def test_a_change_is_made_whole_and_then_interrupted(self):
        made = []

        with pytest.raises(KeyboardInterrupt), Uninterrupted():
            made.append("first")
            ctrl_c()
            made.append("second")

        assert made == ["first", "second"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_the_outermost_of_several_counts(self):
        made = []

        with pytest.raises(KeyboardInterrupt), Uninterrupted():
            with Uninterrupted():
                ctrl_c()
                made.append("inner")
            made.append("outer")

        assert made == ["inner", "outer"]

    def test_a_second_ctrl_c_does_not_wait(self):
        made = []

        with pytest.raises(KeyboardInterrupt), Uninterrupted():
            ctrl_c()
            ctrl_c()
            made.append("never")

        assert made == []
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_an_error_within_passes_through(self):
        with pytest.raises(ValueError), Uninterrupted():
            raise ValueError

        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_program_with_a_handler_of_its_own_keeps_it(self):
        heard = []
        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))

        with Uninterrupted():
            ctrl_c()
            assert heard == [signal.SIGINT]

    def test_a_thread_that_is_never_interrupted_changes_no_handler(self):
        seen = []

        def work() -> None:
            with Uninterrupted():
                seen.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

        assert seen == [signal.default_int_handler]


@pytest.mark.parametrize(
    "command", ["engine", "verification", "verification.record", "verification.verify_op"]
)
def test_ctrl_c_while_a_command_is_imported_is_one_line(command: str, tmp_path: Path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise KeyboardInterrupt\n")  # each imports it
    there = {**os.environ, "PYTHONPATH": str(tmp_path)}

    said = subprocess.run(
        [sys.executable, "-m", command], cwd=ROOT, env=there, capture_output=True, text=True
    )

    assert said.returncode != 0
    assert (said.stdout, said.stderr) == ("", "interrupted\n")


def test_any_other_error_keeps_its_traceback(tmp_path: Path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ImportError('broken')\n")
    there = {**os.environ, "PYTHONPATH": str(tmp_path)}

    said = subprocess.run(
        [sys.executable, "-m", "engine"], cwd=ROOT, env=there, capture_output=True, text=True
    )

    assert "Traceback" in said.stderr and said.stderr.endswith("ImportError: broken\n")
