"""docs/properties.md names tests that exist, and every property has one."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "properties.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)


def is_there(path: str, test: str) -> bool:
    file = ROOT / "tests" / path
    return file.exists() and f"def {test}(" in file.read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists():
    assert len(NAMED) > 30
    assert [named for named in NAMED if not is_there(*named)] == []


def test_a_test_that_is_gone_would_be_noticed():
    assert not is_there("twin/test_linear.py", "test_that_never_was")
    assert not is_there("twin/test_nothing.py", NAMED[0][1])


def test_every_property_but_the_one_left_out_has_a_row_with_a_test():
    rows = re.findall(r"^\| ([\d, ]+) \|.*$", PAGE, re.M)
    numbers = [int(number) for row in rows for number in row.split(",")]

    assert numbers == [n for n in range(1, 30) if n != 23]
    assert all("::" in line for line in PAGE.splitlines() if re.match(r"\| \d", line))
