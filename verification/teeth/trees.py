"""Trees of the checkout in which faults are planted and built; the checkout is never written to.

Sources are hard links of one unmutated tree, so that a tree costs milliseconds; what is written to
(the edited file, objects, the library) is a copy. Knows the Makefile and the file system.
"""

import os
import re
import shutil
from pathlib import Path

from verification.mutants.build import BuildError, Tree
from verification.mutants.faults import Edit

LINKED = ("csrc", "engine", "tests", "verification", "docs", "golden")
COPIED = ("Makefile", "pyproject.toml", "README.md")
NOT_TESTED = ("runtime/status.c.o",)  # carries the source stamp, so it always differs
# nvcc leaves the names of its temporary files in an object: the same code never has the same bytes.
TEMPORARY_NAME = re.compile(rb"tmpxft_[0-9a-f]{8}_[0-9a-f]{8}")

OK, STILLBORN, EQUAL = "ok", "does not compile", "same object code"


def pristine_tree(root: Path, folder: Path, make: tuple[str, ...]) -> Tree:
    """The checkout without a fault, copied and built."""
    tree = Tree(folder / "pristine", make)
    for name in LINKED:
        ignore = shutil.ignore_patterns("*.so", "__pycache__", ".pytest_cache")
        shutil.copytree(root / name, tree.root / name, ignore=ignore)
    for name in COPIED:
        shutil.copy2(root / name, tree.root / name)
    tree.build("the unmutated tree")
    return tree


def plant(pristine: Tree, folder: Path, name: str, edit: Edit) -> tuple[Tree, str]:
    """A tree with one change in it, built if it is of csrc/.

    Returns:
        The tree, and OK, STILLBORN or EQUAL.

    Raises:
        CatalogueError: the edit does not apply.
    """
    tree = Tree(folder / name, pristine.make)
    for part in LINKED:
        shutil.copytree(pristine.root / part, tree.root / part, copy_function=_link)
    for part in COPIED:
        os.link(pristine.root / part, tree.root / part)
    path = tree.root / edit.file
    text = edit.apply(path.read_text(encoding="utf-8"))
    path.unlink()
    path.write_text(text, encoding="utf-8")
    if not edit.file.startswith("csrc/"):
        return tree, OK
    shutil.copytree(pristine.root / "build", tree.root / "build")
    try:
        tree.build(name)
    except BuildError:
        return tree, STILLBORN
    return tree, EQUAL if _same_objects(pristine.root / "build", tree.root / "build") else OK


def _link(source: str, target: str) -> None:
    if source.endswith(".so"):
        shutil.copy2(source, target)  # make writes the library anew, perhaps into the same file
    else:
        os.link(source, target)


def _same_objects(one: Path, other: Path) -> bool:
    names = [path.relative_to(one) for path in one.rglob("*.o")]
    return all(
        _code(one / name) == _code(other / name)
        for name in names
        if name.as_posix() not in NOT_TESTED
    )


def _code(path: Path) -> bytes:
    return TEMPORARY_NAME.sub(b"", path.read_bytes())
