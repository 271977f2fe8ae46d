import os
from dataclasses import replace

import pytest

from verification.evidence import EVIDENCE, read
from verification.mutants.catalogue import load_catalogue
from verification.teeth import cases, fork_server
from verification.teeth.arena import ALIVE, KILLED, Answer, Result
from verification.teeth.plan import from_mutant
from verification.teeth.properties import (
    BEGIN,
    NAME,
    PAGE,
    Property,
    check_of,
    chosen,
    found_by,
    read_page,
    record_of,
    with_findings,
)

ROWS = """# Properties

| | property | | tests |
|---|---|---|---|
| 1 | the same again | B | `twin/a.py::test_a`, `system/b.py::test_b` |
| 2, 3 | a row alone | B | `twin/a.py::test_c` |
| 26 | the twin is the GPU | B | `kernels/g.py::test_g` |
"""
ONE, TWO = (
    Property(
        "1", "the same again", (("tests/twin/a.py", "test_a"), ("tests/system/b.py", "test_b"))
    ),
    Property("2, 3", "a row alone", (("tests/twin/a.py", "test_c"),)),
)


def result(name: str, *failed: str, status: str = KILLED) -> Result:
    return Result(name, "ok", (Answer("properties", status, "", "", None, failed, 1.0),))


def test_the_page_is_read_and_what_needs_a_device_is_left_to_its_lane():
    assert read_page(ROWS) == [ONE, TWO]
    assert check_of([ONE, TWO]).request == {
        "kind": "properties",
        "tests": [
            "tests/twin/a.py::test_a",
            "tests/system/b.py::test_b",
            "tests/twin/a.py::test_c",
        ],
    }


def test_every_property_of_the_page_that_a_cpu_can_show_is_asked():
    numbers = [n for each in read_page(PAGE.read_text()) for n in each.number.split(", ")]

    assert numbers[:28] == [str(n) for n in range(1, 30) if n != 23]
    assert numbers[28:] == [f"A{n}" for n in range(1, 14)]


def test_a_property_finds_a_fault_by_any_of_its_tests():
    found = found_by(
        [ONE, TWO],
        [
            result("first", "tests/system/b.py::test_b"),
            result("both", "tests/twin/a.py::test_a", "tests/twin/a.py::test_c"),
            result("none", status=ALIVE),
        ],
    )

    assert found == {"first": ["1"], "both": ["1", "2, 3"], "none": []}


def test_a_crash_fails_every_test():
    assert found_by([ONE, TWO], [result("x")]) == {"x": ["1", "2, 3"]}


@pytest.fixture
def record():
    first = from_mutant(load_catalogue()[0])
    planted = [replace(first, id=name) for name in ("first", "both", "none")]
    found = {"first": ["1"], "both": ["1", "2, 3"], "none": []}
    return record_of([ONE, TWO], planted, found, 1.0)


def test_what_only_one_property_finds_is_counted_for_it(record):
    by_property, unseen = record.tables

    assert [score.hits for score in record.scores] == [2, 1]
    assert by_property.rows == (
        ("1", "the same again", 2, 1, "first"),
        ("2, 3", "a row alone", 1, 0, "none"),
    )
    assert [row[0] for row in unseen.rows] == ["none"]


def test_the_pages_section_is_made_anew_each_time_and_names_no_further_property(record):
    page = with_findings(ROWS, record)

    assert page.startswith(ROWS.rstrip())
    assert "| no. 1 | 2 | first |\n| no. 2, 3 | 1 | none |" in page
    assert with_findings(page, record) == page
    assert read_page(page) == [ONE, TWO]


def test_the_section_in_git_is_that_of_its_record():
    text = PAGE.read_text(encoding="utf-8")

    assert BEGIN in text
    assert text == with_findings(text, read(EVIDENCE / f"{NAME}.json"))


def test_the_faults_are_of_what_computes_in_an_order_that_does_not_change():
    planted = chosen()

    assert planted == chosen()
    assert not any(each.is_legal for each in planted)
    files = {each.edit.file for each in planted}
    assert {"csrc/twin/attention.c", "engine/scheduler.py"} <= files
    assert "engine/answer_text.py" not in files


def test_a_test_is_known_by_its_file_and_function():
    assert fork_server._bare("tests/a.py::TestIt::test_b[x::y-1]") == "tests/a.py::test_b"


def test_of_what_many_share_some_are_made_and_all_of_what_is_made_for_one(tmp_path):
    (tmp_path / "test_models.py").write_text(
        "import pytest\n"
        "@pytest.fixture(scope='module', params=range(6))\n"
        "def model(request): return request.param\n"
        "@pytest.mark.parametrize('size', range(5))\n"
        "def test_it(model, size): pass\n"
        "@pytest.mark.parametrize('size', range(5))\n"
        "def test_alone(size): pass\n"
    )

    class Recorder:
        kept: list[str]

        def pytest_collection_modifyitems(self, items):
            self.kept = [item.name for item in cases.of_few_fixtures(items, 3)]

    recorder = Recorder()
    options = ["-qq", "--collect-only", "-p", "no:cacheprovider", "-c", os.devnull]
    pytest.main([*options, str(tmp_path)], plugins=[recorder])

    expected = [f"test_it[{model}-{size}]" for model in (0, 2, 5) for size in range(5)]
    assert sorted(recorder.kept) == sorted(expected + [f"test_alone[{i}]" for i in range(5)])


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 4]), (30, [0, 9, 19, 29])]
)
def test_a_few_cases_are_spread_over_all(count: int, expected: list[int]):
    assert cases.spread(list(range(count)), 4) == expected
