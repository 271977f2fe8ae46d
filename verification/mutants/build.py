"""Builds the twin, whole once and then once per fault, in trees of its own.

Knows the Makefile and the file system; knows nothing of verdicts. The checkout is never written to.
Each faulty tree starts as a copy of the finished one, objects and times included, so make compiles
what the fault touches and links.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.bindings import Library
from engine.errors import EngineError
from engine.source_stamp import source_stamp
from verification.mutants.catalogue import Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
MAKE = ("make", "--silent", "CUDA=none", "VENV=system", "build")
PARALLEL_BUILDS = 2


class BuildError(EngineError):
    """A tree did not compile; the message has the fault and the compiler's words."""


@dataclass(frozen=True)
class Tree:
    """A directory with csrc/, the Makefile and, once built, the library.

    Args:
        make: the command that builds it.
    """

    root: Path
    make: tuple[str, ...] = MAKE

    @property
    def csrc(self) -> Path:
        """Its sources."""
        return self.root / "csrc"

    def build(self, what: str) -> None:
        """Runs make.

        Args:
            what: the fault, for the message.

        Raises:
            BuildError: make failed.
        """
        # What an outer make exports (its flags, its variables) must not reach this one.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        # A group of its own: Ctrl-C must not look like a fault that does not compile.
        done = subprocess.run(
            self.make,
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            process_group=0,
        )
        if done.returncode != 0:
            raise BuildError(f"{what} does not build:\n{done.stdout}{done.stderr}")

    def library(self) -> Library:
        """The built library, checked to be of these very sources."""
        return Library(self.root / "engine" / "libengine.so", source_stamp(self.csrc))


@contextmanager
def workshop(root: Path = ROOT) -> Iterator["Workshop"]:
    """A place where trees are built; all of it is gone afterwards."""
    with TemporaryDirectory(prefix="touchstone-mutants-") as folder:
        yield Workshop(root, Path(folder))


class Workshop:
    """Builds trees below one folder.

    Args:
        root: the checkout to copy from.
        folder: where trees go.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._folder = folder
        self.pristine = Tree(folder / "pristine")
        (self.pristine.root / "engine").mkdir(parents=True)
        shutil.copytree(root / "csrc", self.pristine.csrc)
        shutil.copy2(root / "Makefile", self.pristine.root)
        shutil.copy2(root / "engine" / "source_stamp.py", self.pristine.root / "engine")
        self.pristine.build("the unmutated twin")

    def plant(self, mutant: Mutant) -> Tree:
        """A built tree with one fault in it.

        Raises:
            CatalogueError: its text does not apply.
            BuildError: it does not compile.
        """
        tree = Tree(self._folder / mutant.id)
        shutil.copytree(self.pristine.root, tree.root)
        path = tree.csrc / mutant.file
        path.write_text(mutant.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
        tree.build(f"mutant {mutant.id}")
        return tree

    def plant_all(self, mutants: Iterable[Mutant]) -> Iterator[tuple[Mutant, Tree]]:
        """Faults with their trees, in order; the next ones are built while one is judged."""
        with ThreadPoolExecutor(PARALLEL_BUILDS) as pool:
            waiting = [(mutant, pool.submit(self.plant, mutant)) for mutant in mutants]
            try:
                for mutant, tree in waiting:
                    yield mutant, tree.result()
            finally:
                for _, tree in waiting:
                    tree.cancel()
