"""What README and docs say of the tree is true: files, links and make's targets that they name."""

import re
from pathlib import Path

import pytest

from tests.tree import ROOT

# Without docs/log.md, which speaks of what was, and docs/evidence.md, which quotes other trees.
DOCUMENTS = (
    "README.md",
    "docs/architecture.md",
    "docs/glossary.md",
    "docs/numerics.md",
    "docs/properties.md",
    "docs/reading-the-verdict.md",
    "golden/README.md",
    "golden/hardware/README.md",
    "tests/README.md",
)
FOLDERS = ("csrc", "engine", "verification", "tests", "golden", "docs")
WRITTEN = {"verify.json", "verify.html"}  # by a command
FOREIGN = {"config.json"}  # of a model


def names_of(tree: Path) -> set[str]:
    """The name of every file below the folders of the tree, and of those at its top."""
    below = (path for folder in FOLDERS for path in (tree / folder).rglob("*"))
    return {path.name for path in (*below, *tree.iterdir())}


def missing_files(text: str, document: Path) -> list[str]:
    """Paths and file names of a document that are not there.

    A path may begin at the root, in csrc/, in tests/ or where the document lies; x stands for any
    name. Words with a slash between them are no path unless they begin with a folder of ours.
    """
    text = re.sub(r"https?://\S+", "", text)
    bases = (ROOT, ROOT / "csrc", ROOT / "tests", document.parent)
    missing = []
    for path in re.findall(r"(?<![\w./<-])(?:[a-z_]+/)+[\w.-]*\w", text):
        is_path = path.split("/")[0] in FOLDERS or "." in Path(path).name
        is_placeholder = re.search(r"(^|_)x\.", Path(path).name)
        if is_path and not is_placeholder and not any(is_there(base / path) for base in bases):
            missing.append(path)
    known = names_of(ROOT) | WRITTEN | FOREIGN
    names = re.findall(r"(?<![\w./*-])\w[\w-]*\.(?:py|c|h|cuh?|toml|jsonl?|md|svg)\b", text)
    return missing + [name for name in names if name not in known]


def is_there(path: Path) -> bool:
    return path.exists() or path.with_suffix(".py").exists()


def missing_targets(text: str) -> list[str]:
    """Targets of make that a document names and the Makefile has not."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    return [
        t for t in re.findall(r"(?:`|^ {4}|\$ )make ([a-z][a-z-]*)", text, re.M) if t not in targets
    ]


@pytest.mark.parametrize("package", ["engine", "verification"])
def test_every_module_is_where_a_reader_is_told_to_look(package: str):
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.split(f"| of `{package}/` | modules |")[1].split("\n\n")[0]
    below = (ROOT / package).iterdir()
    modules = {path.stem for path in below if path.suffix == ".py" and "__" not in path.name}
    folders = {f"{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")}

    assert set(re.findall(r"`([\w/]+)`", table)) == modules | folders


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str):
    assert missing_files((ROOT / document).read_text(encoding="utf-8"), ROOT / document) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]

    assert [link for link in links if not ((ROOT / document).parent / link).exists()] == []


def anchors(text: str) -> set[str]:
    """What a link may name in a page: its headings in small letters, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/log.md"])
def test_every_link_into_a_page_finds_its_heading(document: str):
    path = ROOT / document
    links = re.findall(r"\]\(([^):#]*)#([^)]+)\)", path.read_text(encoding="utf-8"))
    pages = {page: path.parent / page if page else path for page, _ in links}
    known = {page: anchors(found.read_text(encoding="utf-8")) for page, found in pages.items()}

    assert [(page, anchor) for page, anchor in links if anchor not in known[page]] == []


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("2026-11-21 · exp2", "2026-11-21--exp2"),
        ("The twin's *k16* step, once", "the-twins-k16-step-once"),
    ],
)
def test_a_heading_is_linked_to_as_git_hosts_do(heading: str, anchor: str):
    assert anchors(f"text\n## {heading}\n") == {anchor}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_target_of_make_that_a_document_names_exists(document: str):
    assert missing_targets((ROOT / document).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`csrc/twin/linear.c` and `twin/linear.c`", []),
        ("`csrc/twin/never.c`", ["csrc/twin/never.c"]),
        ("`kernels/never.cu`", ["kernels/never.cu"]),
        ("engine/never", ["engine/never"]),
        ("`engine/config`, `bindings.py`", []),
        ("see never_was.py.", ["never_was.py"]),
        ("`kernels/x.cu`, tests/twin/test_x.py", []),
        ("at https://example.org/csrc/never.c", []),
        ("an and/or, meta-llama/Llama-3.2-1B", []),
    ],
)
def test_a_file_that_is_gone_would_be_noticed(text: str, missing: list[str]):
    assert missing_files(text, ROOT / "README.md") == missing


def test_a_target_that_is_gone_would_be_noticed():
    assert missing_targets("`make test`\n    make never\n    $ make gone-too X=1") == [
        "never",
        "gone-too",
    ]
