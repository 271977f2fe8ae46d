from dataclasses import replace
from pathlib import Path

import pytest

from verification.mutants.catalogue import CatalogueError
from verification.sanitizers import translation
from verification.sanitizers.translation import EDITS, KERNELS, translate

ROOT = Path(__file__).resolve().parents[3]


def test_the_translation_applies_to_todays_sources_and_leaves_them_alone(tmp_path: Path):
    before = {edit.file: (ROOT / edit.file).read_bytes() for edit in EDITS}
    commands = []

    library = translate(ROOT, tmp_path / "copy", "/a/nvcc", lambda *words: commands.append(words))

    assert {file: (ROOT / file).read_bytes() for file in before} == before
    (words,) = commands
    assert words[:7] == ("env", "-u", "MAKEFLAGS", "-u", "MFLAGS", "-u", "MAKELEVEL")
    assert words[-4:] == (str(tmp_path / "copy"), "NVCC=/a/nvcc", "VENV=system", "build")
    assert not library.exists()  # that of the copied checkout would pass for it
    steps = "".join((tmp_path / "copy" / edit.file).read_text() for edit in EDITS)
    assert "named_barrier_sync<kConsumersMeet" not in steps
    assert "(kTileWarpsMeet + place)" not in steps


def test_every_meeting_of_part_of_the_block_is_translated_or_named_here():
    # What remains are meetings with the warps that keep the grid's: none touches shared memory.
    folder = ROOT / "csrc" / "kernels"
    text = "".join(path.read_text() for path in sorted(folder.glob("decode_[!b]*.cu*")))

    meetings = text.count("named_barrier_sync<")

    replaced = sum(edit.before.count("named_barrier_sync<") for edit in EDITS)
    grid = (folder / "decode_grid.cuh").read_text().count("named_barrier_sync<")
    assert replaced == 2
    assert meetings == grid + 1  # the tile's, in decode_attention.cuh


def test_a_source_that_has_changed_is_no_translation(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(translation, "EDITS", (replace(EDITS[0], before="not there"),))

    with pytest.raises(CatalogueError, match="occurs 0 times"):
        translate(ROOT, tmp_path / "copy", "nvcc", lambda *words: "")


def test_the_kernels_are_of_the_files_that_are_translated():
    text = "".join((ROOT / edit.file).read_text() for edit in EDITS)

    assert all(f"{kernel}(" in text for kernel in KERNELS)
