"""The header comment of every C and CUDA source: one label a line, and no path that leads nowhere.

Each rule is a function over text, and each is shown a header that breaks it.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".c", ".h", ".cu", ".cuh"))
LABELS = "Shapes|Rounding|Mapping|Cost|Source|See|Numerics|Layout"


def header(source: str) -> list[str]:
    """The comment that a file begins with, line by line, without its slashes."""
    lines = source.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))
    return [line[2:] for line in lines[:end]]


def swallowed_labels(source: str) -> list[str]:
    """Lines with a label after other words, as a formatter leaves them that joins lines."""
    return [line for line in header(source) if re.search(rf"\S.* ({LABELS})(  |$)", line)]


def dead_paths(path: Path, source: str) -> list[str]:
    """What the See lines name and is nowhere: beside the file, in csrc/ or in the repository."""
    text = "\n".join(header(source)).partition("\n See ")[2]
    names = re.findall(r"(?:[\w*]+/)*[\w*]+\.(?:cuh?|[ch]|py|md)\b", text)
    roots = (path.parent, CSRC, CSRC / "kernels", ROOT)
    return [name for name in names if not any(list(root.glob(name)) for root in roots)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(CSRC).as_posix())
def test_a_header_has_one_label_a_line_and_names_what_is_there(path: Path):
    source = path.read_text(encoding="utf-8")

    assert swallowed_labels(source) == []
    assert dead_paths(path, source) == []


@pytest.mark.parametrize(
    "line",
    ["// out [n] Rounding  none", "// thread and step Cost      4 bytes", "// the fold) See"],
)
def test_a_label_that_a_line_has_swallowed_is_noticed(line: str):
    assert swallowed_labels(f"// a.c -- b.\n{line}\nint x;  // See  y\n") == [line[2:]]


def test_labels_at_their_place_and_words_of_that_name_are_let_be():
    source = "// a.c -- b.\n//\n// Shapes    x\n// See       twin/linear.c\n// The Source of it\n"

    assert swallowed_labels(source) == []


def test_a_path_that_leads_nowhere_is_noticed():
    source = "// a.c -- b.\n//\n// See       twin/linear.c, kernels/linear_*.cu, twin/nothing.c\n"

    assert dead_paths(CSRC / "twin" / "a.c", source) == ["twin/nothing.c"]
