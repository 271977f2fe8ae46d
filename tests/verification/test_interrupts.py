"""Ctrl-C in the commands that run for minutes."""

from types import ModuleType

import pytest

import verification.localisation.__main__ as localisation
import verification.mutants.__main__ as mutants
import verification.teeth.__main__ as teeth
from verification import false_alarms, record
from verification.interrupts import INTERRUPTED
from verification.mutants import policy
from verification.mutants.build import BuildError, Tree
from verification.teeth import properties


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (teeth, "whole_plan"),
        (properties, "chosen"),
        (localisation, "read_lines"),
        (false_alarms, "try_transformers"),
        (mutants, "run"),
        (policy, "run"),
        (record, "record"),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_an_interrupted_command_says_so_in_one_line(
    command: ModuleType, work: str, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path
):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, work, stopped)
    monkeypatch.chdir(tmp_path)

    assert command.main([]) == INTERRUPTED == 130
    said = capsys.readouterr()
    assert said.out.strip().splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in said.out + said.err


def test_ctrl_c_does_not_reach_a_build(tmp_path):
    # make would leave with an error, and the fault would count as one that does not compile
    leads_its_group = "import os, sys; sys.exit(os.getpgid(0) != os.getpid())"
    Tree(tmp_path, ("python3", "-c", leads_its_group)).build("a tree")
    with pytest.raises(BuildError):
        Tree(tmp_path, ("python3", "-c", "import sys; sys.exit(1)")).build("a tree")
