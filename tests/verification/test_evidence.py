import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verification.evidence import (
    EVIDENCE,
    Evidence,
    EvidenceError,
    Score,
    Table,
    evidence,
    read,
    suite_sha256,
    wilson,
    write,
)


def record(**changes) -> Evidence:
    table = Table(
        "kills", ("fault", "level", "s"), (("a fault", None, 1.5), ("another", "bits", 2))
    )
    scores = (Score("faults found", 3, 4, at_least=0.5),)
    return replace(
        evidence("a-record", "Title", "Question?", "make it", scores, (table,)), **changes
    )


class TestWilson:
    @pytest.mark.parametrize(
        ("hits", "total", "low", "high"),
        [
            (0, 30, 0.0, 0.1135),
            (30, 30, 0.8865, 1.0),
            (1, 2, 0.0945, 0.9055),
            (81, 263, 0.2553, 0.3662),
        ],
    )
    def test_it_gives_published_intervals(self, hits: int, total: int, low: float, high: float):
        assert wilson(hits, total) == pytest.approx((low, high), abs=5e-5)

    @given(st.integers(1, 10_000), st.data())
    def test_it_contains_the_share_and_solves_its_equation(self, total: int, data):
        hits = data.draw(st.integers(0, total))

        low, high = wilson(hits, total)

        assert 0 <= low <= hits / total <= high <= 1
        for end in (low, high):
            if 0 < end < 1:  # an end is where the share lies 1.96 of its own deviations away
                distance = abs(hits / total - end)
                assert distance == pytest.approx(1.95996 * math.sqrt(end * (1 - end) / total), 1e-3)

    @pytest.mark.parametrize(("hits", "total"), [(1, 0), (0, 0), (-1, 3), (4, 3)])
    def test_what_is_no_share_is_refused(self, hits: int, total: int):
        with pytest.raises(EvidenceError, match=f"{hits} of {total}"):
            wilson(hits, total)


class TestAScore:
    def test_a_goal_is_reached_or_missed_on_either_side(self):
        assert Score("found", 97, 100, at_least=0.97).passed
        assert not Score("found", 96, 100, at_least=0.97).passed
        assert Score("false alarms", 0, 10, at_most=0.0).passed
        assert not Score("false alarms", 1, 10, at_most=0.0).passed

    def test_nothing_counted_reaches_no_goal(self):
        assert not Score("found", 0, 0).passed
        assert not record(scores=()).passed


class TestARecord:
    def test_it_is_read_as_it_was_written(self, tmp_path):
        assert read(write(record(), tmp_path)) == record(
            recorded=read(tmp_path / "a-record.json").recorded
        )

    def test_it_says_where_and_of_what_it_was_made(self):
        made = record()

        assert made.csrc_sha256 and made.suite_sha256 == suite_sha256()
        assert made.machine["cpu"] and made.machine["cores"] and "gpu" not in made.machine
        assert set(made.versions) == {"torch", "transformers", "python"}

    def test_one_edited_by_hand_is_refused(self, tmp_path):
        path = write(record(), tmp_path)
        path.write_text(path.read_text().replace('"hits": 3', '"hits": 4'))

        with pytest.raises(EvidenceError, match=r"a-record\.json is not as it was written"):
            read(path)

    def test_one_under_another_name_is_refused(self, tmp_path):
        path = write(record(), tmp_path).rename(tmp_path / "other.json")

        with pytest.raises(EvidenceError, match="other.json holds the record 'a-record'"):
            read(path)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": ""}', "null"])
    def test_what_is_no_record_is_refused_by_name(self, tmp_path, text: str):
        path = tmp_path / "x.json"
        path.write_text(text)

        with pytest.raises(EvidenceError, match=r"x\.json"):
            read(path)

    def test_another_schema_is_refused(self, tmp_path):
        path = write(record(schema=99), tmp_path)

        with pytest.raises(EvidenceError, match="schema 99"):
            read(path)

    def test_one_too_large_for_git_is_refused(self, tmp_path):
        rows = tuple(("x" * 1000,) for _ in range(400))

        with pytest.raises(EvidenceError, match="the limit is"):
            write(record(tables=(Table("long", ("x",), rows),)), tmp_path)

    def test_a_row_of_another_length_than_the_heading_is_refused(self):
        with pytest.raises(EvidenceError, match="'kills': a row has 1 cells, the heading 2"):
            Table("kills", ("a", "b"), (("x",),))


def test_the_suites_hash_notices_a_changed_fault(tmp_path):
    (tmp_path / "verification").mkdir()
    catalogue = tmp_path / "verification" / "catalogue.toml"
    catalogue.write_text("a")
    before = suite_sha256(tmp_path)
    catalogue.write_text("b")

    assert suite_sha256(tmp_path) != before


def test_every_record_in_git_reached_its_goals():
    records = [read(path) for path in EVIDENCE.glob("*.json")]

    missed = [(r.name, s.what, s.hits, s.total) for r in records for s in r.scores if not s.passed]
    assert missed == []
    assert all(record.scores for record in records)
