"""What an answer depends on, as a key: a stopped run goes on, and no stale answer is used.

An answer is about an edit, a check, the product that is checked (csrc/, engine/, the suite, its
goldens) and, where tests are the check, those very tests and what they import. Lists of faults and
this package say what is asked, not what is answered: they do not enter.
"""

import hashlib
import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from verification.teeth.checks import PROPERTIES, TESTS, Check
from verification.teeth.plan import Planted

PRODUCT = ("csrc", "engine", "verification", "golden")
NOT_OF_IT = (".so", ".pyc")


class Keys:
    """Keys for one state of a checkout.

    Args:
        root: of the checkout; hashed once, when it is first needed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._hash = lru_cache(maxsize=None)(self._hash_of)

    def of_build(self, planted: Planted) -> str:
        """Of what the compiler says."""
        return _sha256("build", self._hash(("csrc", "Makefile")), asdict(planted.edit))

    def of_answer(self, planted: Planted | None, check: Check) -> str:
        """Of what a check says of a fault; None: of the tree without one."""
        edit = None if planted is None else asdict(planted.edit)
        tested = ""
        if check.kind in (TESTS, PROPERTIES):
            paths = tuple(dict.fromkeys(t.partition("::")[0] for t in check.request["tests"]))
            tested = self._hash(paths) + self._hash(("tests/",))
        return _sha256("answer", self._hash(PRODUCT), tested, edit, check.request)

    def _hash_of(self, paths: tuple[str, ...]) -> str:
        """Of every file at or below these paths; of "tests/" only what tests share."""
        digest = hashlib.sha256()
        for path in paths:
            start = self._root / path
            found = sorted(start.rglob("*")) if start.is_dir() else [start]
            for file in found:
                name = file.relative_to(self._root).as_posix()
                if path == "tests/" and file.name.startswith("test_"):
                    continue
                if file.is_file() and file.suffix not in NOT_OF_IT and not _is_about_us(name):
                    content = hashlib.sha256(file.read_bytes()).hexdigest()
                    digest.update(f"{name}\0{content}\0".encode())
        return digest.hexdigest()


def _is_about_us(name: str) -> bool:
    about_us = any(word in name for word in ("teeth", "evidence", "mutants"))
    return about_us and not name.endswith("judge.py")


def _sha256(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
