"""The tree's own folders and sources, for tests of what the tree looks like."""

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC, ENGINE, TESTS = ROOT / "csrc", ROOT / "engine", ROOT / "tests"
VERIFICATION = ROOT / "verification"

SOURCES = (".py", ".c", ".h", ".cu", ".cuh")


def files(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in suffixes and p.is_file())


def c_sources() -> list[Path]:
    return files(CSRC, ".c", ".h", ".cu", ".cuh")


def relative(paths: Iterable[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]
