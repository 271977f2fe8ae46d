import pytest

from tests.verification.test_evidence import record
from verification import evidence_page
from verification.evidence import ROOT, Score, Table, write
from verification.evidence_page import PAGE, SECTIONS, load_all, main, render


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_page, "PAGE", tmp_path / "evidence.md")
    monkeypatch.setattr(evidence_page.load_all, "__defaults__", (tmp_path,))
    write(record(), tmp_path)
    return tmp_path


def test_the_page_in_git_is_that_of_its_records():
    assert PAGE.read_text(encoding="utf-8") == render(load_all())


def test_the_readme_has_the_figure_of_every_goal():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = {
        f"{score.hits} of {score.total}"
        for each in load_all()
        for score in each.scores
        if score.at_least is not None
    }

    assert {figure for figure in figures if figure not in readme} == set()


def test_a_page_just_made_passes_its_check(folder):
    assert main([]) == 0
    assert main(["--check"]) == 0


@pytest.mark.parametrize("change", [("3 of 4", "4 of 4"), ("Title", "Other")])
def test_a_page_edited_by_hand_fails_its_check(folder, capsys, change):
    main([])
    page = folder / "evidence.md"
    page.write_text(page.read_text().replace(*change))

    assert main(["--check"]) == 1
    assert "run make evidence" in capsys.readouterr().out


def test_a_record_edited_by_hand_fails_the_command(folder, capsys):
    path = folder / "a-record.json"
    path.write_text(path.read_text().replace("Title", "Other"))

    assert main([]) == 1
    assert "edited by hand" in capsys.readouterr().out


def test_a_missing_page_fails_its_check(folder):
    assert main(["--check"]) == 1


def test_it_shows_counts_intervals_goals_and_where_it_was_measured():
    page = render([record()])

    assert "3 of 4 (75.0 %) | 30.1 to 95.4 % | ≥ 50 % | yes" in page
    for fact in (record().csrc_sha256[:16], record().suite_sha256[:16], "`make it`", "cores"):
        assert fact in page


def test_a_missed_goal_is_shown_as_one():
    page = render([record(scores=(Score("found", 1, 2, at_least=1.0),))])

    assert "| **no** |" in page


def test_records_come_in_the_order_of_the_page_and_others_after_them(tmp_path):
    for name in ("other", SECTIONS[2], SECTIONS[0]):
        write(record(name=name), tmp_path)

    assert [each.name for each in load_all(tmp_path)] == [SECTIONS[0], SECTIONS[2], "other"]


def test_a_cell_cannot_break_its_table():
    table = Table("t", ("a",), (("x | y\nz",), (None,)), is_folded=True)

    page = render([record(tables=(table,))])

    assert "| x \\| y z |" in page
    assert "| – |" in page
