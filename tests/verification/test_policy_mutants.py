"""The runner of the policy's planted faults: it finds one, and refuses what no longer applies."""

from dataclasses import replace
from pathlib import Path

import pytest

from verification.mutants.catalogue import CatalogueError
from verification.mutants.policy import POLICY_PATH, check_all_apply, judge, load_policy, main

QUICK = ("tests/engine/test_answer_text.py",)
BY_ID = {mutant.id: mutant for mutant in load_policy()}


def test_every_fault_still_applies_to_the_sources():
    check_all_apply(BY_ID.values())


def test_there_are_enough_of_them_in_every_part():
    files = {mutant.file for mutant in BY_ID.values()}

    assert len(BY_ID) >= 25
    assert {"block_manager.py", "running_batch.py", "scheduler.py", "answer_text.py"} <= files


def test_a_planted_fault_is_found_and_its_test_named():
    verdict = judge(BY_ID["held-text-lost"], QUICK)

    assert verdict.found_by.startswith("test_answer_text.py::test_")


@pytest.mark.slow
def test_the_tests_pass_without_a_fault_and_with_one_that_they_do_not_see():
    assert judge(None, QUICK).found_by is None
    assert judge(BY_ID["most-recent-evicted"], QUICK).found_by is None


def test_tests_that_cannot_run_are_no_verdict():
    with pytest.raises(CatalogueError, match="pytest did not run"):
        judge(None, ("tests/engine/test_nothing.py",))


def test_a_fault_that_the_sources_outgrew_fails_the_run(monkeypatch, capsys):
    stale = replace(BY_ID["held-text-lost"], before="no such text")
    monkeypatch.setattr("verification.mutants.policy.load_policy", lambda: (stale,))

    assert main([]) == 1
    assert "its text occurs 0 times in engine/answer_text.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[mutant]]\nid = "a"\nfile = "x"\nfault = ""\nbefore = ""', "mutant a: .*'after'"),
        (POLICY_PATH.read_text() + POLICY_PATH.read_text(), "an id is used twice"),
    ],
    ids=["a field is missing", "an id comes twice"],
)
def test_a_malformed_list_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "x.toml").write_text(text)

    with pytest.raises(CatalogueError, match=message):
        load_policy(tmp_path / "x.toml")


def test_an_unknown_id_is_refused(capsys):
    assert main(["--only", "nothing"]) == 1
    assert "no such mutant" in capsys.readouterr().out
