"""What is published: files one can keep in mind, which say what they are and name no machine."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.tree import CSRC, ENGINE, ROOT, SOURCES, TESTS, VERIFICATION, c_sources, files, relative

MAX_LINES = 400
MAX_FORWARD_LINES = 150


class TestSizes:
    def test_the_decoder_fits_one_page(self):
        assert len((CSRC / "model" / "forward.c").read_text().splitlines()) <= MAX_FORWARD_LINES

    @pytest.mark.parametrize("folder", ["csrc", "engine", "verification"])
    def test_no_source_is_longer_than_one_can_keep_in_mind(self, folder: str):
        long = {
            path.relative_to(ROOT).as_posix(): count
            for path in files(ROOT / folder, *SOURCES)
            if (count := len(path.read_text().splitlines())) > MAX_LINES
        }

        assert long == {}

    def test_every_module_says_what_it_is(self):
        for folder in (ENGINE, VERIFICATION):
            for path in files(folder, ".py"):
                assert ast.get_docstring(ast.parse(path.read_text())), path
        for path in c_sources():
            assert path.read_text().startswith(f"// {path.name} -- "), path


def tracked_files() -> list[Path]:
    """What git tracks, or, in a copy without git, every file of the tree's own folders."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0:
        return [
            path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()
        ]
    folders = ("csrc", "engine", "verification", "tests", "docs")
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return [path for path in paths if path.is_file() and path.suffix in SOURCES]


# Spelled in pieces, so that this file does not match itself.
PRIVATE = re.compile(
    "|".join(
        [
            r"(?<![\w.])/" + r"home/\w",
            r"(?<![\w.])/" + r"root/",
            r"(?<![\w.])/" + r"tmp/\w",
            r"(?<![\w.])/" + r"work/",
            r"(?<![\w.])/" + r"Users/\w",
            "pypi" + r"\.org",
            "files\\." + "pythonhosted",
            r"index-url\s*=?\s*http",
            "proxy\\." + "golang",
            "registry\\." + "npmjs",
        ]
    )
)
TEXT = (*SOURCES, ".md", ".toml", ".txt", ".json", ".jsonl", ".yml", ".yaml", ".html", "")


class TestWhatIsPublished:
    def test_no_file_names_this_machine_or_a_registry(self):
        found = {}
        for path in tracked_files():
            if path.suffix not in TEXT or path.stat().st_size > 4_000_000:
                continue
            match = PRIVATE.search(path.read_text(encoding="utf-8", errors="replace"))
            if match:
                found[path.relative_to(ROOT).as_posix()] = match[0]

        assert found == {}

    @pytest.mark.parametrize(
        "text",
        [
            "cd /" + "home/me",
            "see /" + "tmp/x.log",
            "https://" + "pypi" + ".org/simple",
            "/" + "root/.cache",
        ],
    )
    def test_the_search_finds_what_it_looks_for(self, text: str):
        assert PRIVATE.search(text)

    def test_nothing_is_left_to_be_done(self):
        mark = re.compile("TO" + "DO|FIX" + "ME|XX" + "X")
        guilty = [
            path
            for folder in ("csrc", "engine", "verification", "tests")
            for path in files(ROOT / folder, *SOURCES)
            if mark.search(path.read_text())
        ]

        assert relative(guilty) == []

    def test_no_test_of_a_mirrored_source_has_lost_it(self):
        missing = [
            path
            for path in (TESTS / "engine").glob("test_*.py")
            if not (ENGINE / f"{path.stem.removeprefix('test_')}.py").exists()
            and path.stem != "test_main"  # of __main__.py
        ]

        assert relative(missing) == []

    def test_every_package_is_in_the_distribution(self):
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
        packages = {
            path.parent.relative_to(ROOT).as_posix().replace("/", ".")
            for folder in ("engine", "verification")
            for path in (ROOT / folder).rglob("__init__.py")
        }

        assert sorted(settings["tool"]["setuptools"]["packages"]) == sorted(packages)
