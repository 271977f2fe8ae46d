"""The stamp changes with every source file and with nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.source_stamp import CPU_ALONE, SUFFIXES, source_stamp

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    for name in ("a/x.c", "a/y.h", "b/x.c", "kernel.cu", "kernel.cuh"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"// {name}\n")
    return tmp_path / "csrc"


def test_the_same_sources_have_the_same_stamp(csrc: Path, tmp_path: Path):
    stamp = source_stamp(csrc)
    csrc.rename(tmp_path / "elsewhere")

    assert source_stamp(tmp_path / "elsewhere") == stamp
    assert len(stamp) == 64 and set(stamp) <= set("0123456789abcdef")


@pytest.mark.parametrize("name", ["a/x.c", "a/y.h", "kernel.cu", "kernel.cuh"])
def test_an_altered_source_changes_it(csrc: Path, name: str):
    before = source_stamp(csrc)
    (csrc / name).write_text("// altered\n")

    assert source_stamp(csrc) != before


@pytest.mark.parametrize("name", ["a/x.c", "a/y.h", "kernel.cu", "kernel.cuh"])
def test_a_deleted_source_changes_it(csrc: Path, name: str):
    before = source_stamp(csrc)
    (csrc / name).unlink()

    assert source_stamp(csrc) != before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_new_even_an_empty_source_changes_it(csrc: Path, suffix: str):
    before = source_stamp(csrc)
    (csrc / f"new{suffix}").touch()

    assert source_stamp(csrc) != before


def test_a_moved_source_changes_it(csrc: Path):
    before = source_stamp(csrc)
    (csrc / "a" / "y.h").rename(csrc / "b" / "y.h")

    assert source_stamp(csrc) != before


def test_content_cannot_wander_from_one_file_into_the_next(csrc: Path):
    (csrc / "a" / "x.c").write_text("one")
    (csrc / "a" / "y.h").write_text("two")
    before = source_stamp(csrc)
    (csrc / "a" / "x.c").write_text("onet")
    (csrc / "a" / "y.h").write_text("wo")

    assert source_stamp(csrc) != before


def test_times_and_other_files_do_not_change_it(csrc: Path):
    before = source_stamp(csrc)
    os.utime(csrc / "a" / "x.c", (0, 0))
    (csrc / "notes.txt").write_text("no source")
    (csrc / "a" / "x.o").write_bytes(b"\0")

    assert source_stamp(csrc) == before


def test_as_a_script_it_needs_only_the_standard_library():
    script = ROOT / "engine" / "source_stamp.py"

    printed = subprocess.run(
        [sys.executable, "-I", "-S", str(script)], capture_output=True, text=True, check=True
    )

    assert printed.stdout.strip() == source_stamp(ROOT / "csrc")


def test_a_folder_that_is_left_out_does_not_enter_the_stamp(tmp_path: Path):
    for name in ("kernels/a.cu", "twin/b.c"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("one")
    whole, part = source_stamp(tmp_path), source_stamp(tmp_path, CPU_ALONE)

    (tmp_path / "twin" / "b.c").write_text("two")

    assert source_stamp(tmp_path) != whole
    assert source_stamp(tmp_path, CPU_ALONE) == part
