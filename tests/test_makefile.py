"""The Makefile as a person uses it: what it lists, what it builds again, and where it works.

Everything happens in one copy of the sources, in a directory with a space in its name.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.bindings import Library
from engine.errors import EngineError

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("cc") is None, reason="requires make and cc"
)


class Copy:
    """A copy of the sources in which make may run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.num_loaded = 0
        self.cc = "cc"
        skip = shutil.ignore_patterns("*.so", "__pycache__", ".*")
        for name in ("csrc", "engine"):
            shutil.copytree(ROOT / name, root / name, ignore=skip)
        shutil.copy(ROOT / "Makefile", root)

    def make(self, *arguments: str, check: bool = True, **environment: str) -> str:
        """Run make with the CPU twin alone; returns what it printed."""
        clean = {
            k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        }
        done = subprocess.run(
            ["make", "-j2", "CUDA=none", f"CC={self.cc}", *arguments],
            cwd=self.root,
            capture_output=True,
            text=True,
            env=clean | environment,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def library(self) -> Path:
        return self.root / "engine" / "libengine.so"

    def stamp(self) -> str:
        """What the library in the copy says it was built from."""
        script = self.root / "engine" / "source_stamp.py"
        printed = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, check=True
        ).stdout.strip()
        # under a name of its own: a process loads one path only once
        self.num_loaded += 1
        loaded = self.root / f"loaded_{self.num_loaded}.so"
        shutil.copy(self.library, loaded)
        return Library(loaded, expected_stamp=printed).source_stamp


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("make") / "a directory with a space")


@pytest.fixture(scope="module")
def first_build(copy: Copy) -> str:
    return copy.make()


def test_help_lists_every_target_and_its_variables(copy: Copy):
    text = (copy.root / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):.*## ", text, re.M)

    shown = copy.make("help")

    assert {"help", "build", "verify", "test", "golden", "bench", "lint", "format", "clean"} <= set(
        targets
    )
    for target in targets:
        assert re.search(rf"^  make {target} +\S", shown, re.M), target
    for variable in ("MODEL=", "DEVICE=", "CUDA="):
        assert variable in shown
    assert [line for line in shown.splitlines() if len(line) > 100] == []


def test_every_phony_target_is_declared(copy: Copy):
    text = (copy.root / "Makefile").read_text()
    phony = {word for line in re.findall(r"^\.PHONY: (.*)$", text, re.M) for word in line.split()}

    assert set(re.findall(r"^([a-z-]+):.*## ", text, re.M)) <= phony


def test_a_python_that_is_too_old_is_refused_before_anything_is_fetched(tmp_path: Path):
    fresh = Copy(tmp_path / "fresh")
    shutil.copy(ROOT / "requirements.txt", fresh.root)
    old = tmp_path / "bin" / "python3"
    old.parent.mkdir()
    say = "import sys; sys.version_info = (3, 9, 2, 'final', 0); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" -c "{say}" "$2"\nexit 9\n')
    old.chmod(0o755)

    printed = fresh.make(
        ".venv/.installed", check=False, PATH=f"{old.parent}{os.pathsep}{os.environ['PATH']}"
    )

    assert "Python 3.11 or later is needed, python3 is 3.9" in printed
    assert not (fresh.root / ".venv").exists()


@pytest.mark.slow
class TestBuilding:
    def test_it_builds_where_the_path_has_a_space(self, copy: Copy, first_build: str):
        assert copy.library.exists()
        assert not Library(copy.library, expected_stamp=copy.stamp()).has_cuda

    def test_without_nvcc_it_says_what_is_built(self, first_build: str):
        assert "CPU twin alone" in first_build

    def test_nothing_is_left_outside_build_and_the_library(self, copy: Copy, first_build: str):
        made = {p.relative_to(copy.root).parts[0] for p in copy.root.rglob("*.o")}

        assert made == {"build"}
        assert not list((copy.root / "csrc").rglob("*.d"))

    def test_a_second_make_does_nothing(self, copy: Copy, first_build: str):
        before = copy.library.stat().st_mtime_ns

        printed = copy.make()

        assert copy.library.stat().st_mtime_ns == before
        assert not re.search(r"^  (cc|nvcc|link) ", printed, re.M), printed

    def test_an_altered_source_is_compiled_again_and_changes_the_stamp(
        self, copy: Copy, first_build: str
    ):
        before = copy.stamp()
        source = copy.root / "csrc" / "twin" / "argmax.c"
        original = source.read_text()
        source.write_text(original + "// altered\n")

        printed = copy.make()

        compiled = set(re.findall(r"^  cc +(\S+)", printed, re.M))
        assert compiled == {"csrc/twin/argmax.c", "csrc/runtime/status.c"}
        assert copy.stamp() != before
        source.write_text(original)
        copy.make()
        assert copy.stamp() == before

    def test_an_altered_header_compiles_all_that_include_it(self, copy: Copy, first_build: str):
        header = copy.root / "csrc" / "twin" / "exp2.h"
        original = header.read_text()
        header.write_text(original + "// altered\n")

        compiled = set(re.findall(r"^  cc +(\S+)", copy.make(), re.M))

        assert compiled >= {"csrc/twin/attention.c", "csrc/twin/silu_and_mul.c"}
        assert "csrc/twin/argmax.c" not in compiled
        header.write_text(original)
        copy.make()

    def test_an_added_and_a_deleted_source_change_the_stamp_and_the_library(
        self, copy: Copy, first_build: str
    ):
        before = copy.stamp()
        added = copy.root / "csrc" / "twin" / "added.c"
        added.write_text("int twin_added(void);\nint twin_added(void) { return 1; }\n")
        assert "added.c" in copy.make()
        with_it = copy.stamp()

        added.unlink()
        copy.make()

        assert with_it != before
        assert copy.stamp() == before

    def test_other_flags_build_again(self, copy: Copy, first_build: str):
        copy.cc = "cc -DOTHER"  # stays, so that the tests after this one need no build of their own

        assert "csrc/twin/argmax.c" in copy.make()

    def test_a_library_whose_sources_changed_afterwards_is_refused(
        self, copy: Copy, first_build: str
    ):
        source = copy.root / "csrc" / "twin" / "argmax.c"
        original = source.read_text()
        source.write_text(original + "// altered\n")
        try:
            with pytest.raises(EngineError, match="built from other sources"):
                copy.stamp()
        finally:
            source.write_text(original)
        copy.make()

    def test_a_source_that_does_not_compile_fails_and_leaves_no_new_library(
        self, copy: Copy, first_build: str
    ):
        source = copy.root / "csrc" / "twin" / "argmax.c"
        original = source.read_text()
        before = copy.library.stat().st_mtime_ns
        source.write_text(original + "no C\n")

        printed = copy.make(check=False)

        assert "error" in printed.lower()
        assert copy.library.stat().st_mtime_ns == before
        source.write_text(original)
        copy.make()

    def test_a_warning_is_an_error(self, copy: Copy, first_build: str):
        source = copy.root / "csrc" / "twin" / "argmax.c"
        original = source.read_text()
        source.write_text(original + "static int unused;\n")

        printed = copy.make(check=False)

        assert "unused" in printed and "rror" in printed
        source.write_text(original)
        copy.make()

    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            ("    volatile int32_t *far = ids + num_rows; *far = 0;\n", "heap-buffer-overflow"),
            (
                "    volatile int most = 0x7fffffff; most += vocab_size;\n",
                "signed integer overflow",
            ),
            ("", None),
        ],
        ids=["beyond an array", "overflow", "nothing"],
    )
    def test_the_compilers_sanitizers_find_what_is_planted(
        self, tmp_path: Path, fault: str, said: str | None
    ):
        fresh = Copy(tmp_path / "a fresh copy")
        skip = shutil.ignore_patterns("__pycache__")
        for name in ("tests", "verification", "golden"):
            shutil.copytree(ROOT / name, fresh.root / name, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", fresh.root)
        source = fresh.root / "csrc" / "twin" / "argmax.c"
        head, body = source.read_text().split("Stream stream) {\n", 1)
        source.write_text(f"{head}Stream stream) {{\n{fault}{body}")

        printed = fresh.make(
            *("sanitize-cpu", "VENV=system", "TESTS=tests/twin/test_argmax.py"),
            check=said is None,
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )

        assert said in printed if said else "passed" in printed

    def test_clean_removes_what_was_built(self, tmp_path: Path):
        fresh = Copy(tmp_path / "clean")
        (fresh.root / "build").mkdir()
        fresh.library.touch()

        fresh.make("clean")

        assert not fresh.library.exists() and not (fresh.root / "build").exists()
        assert (fresh.root / "csrc").exists()
