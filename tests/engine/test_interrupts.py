"""Ctrl-C before a command runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tree import ROOT


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
