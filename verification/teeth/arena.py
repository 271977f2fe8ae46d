"""Runs the plan: plants, builds and asks, several faults at a time, and keeps every answer.

Decides the order of work and what is asked again; what an answer is worth is matrix.py's. Answers
are kept one per line as they come, so that a run that was stopped goes on where it was.
Invariant: a check has passed on the unmutated tree before any fault meets it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

from engine.errors import EngineError
from verification.mutants.build import MAKE, ROOT, Tree
from verification.mutants.faults import GPU
from verification.teeth import trees
from verification.teeth.checks import Check
from verification.teeth.keys import Keys
from verification.teeth.plan import GENERATED, Planted

FORK_SERVER = Path(__file__).resolve().parent / "fork_server.py"
MAKE_WITH_CUDA = tuple(word for word in MAKE if word != "CUDA=none")
ALIVE, KILLED, BROKEN = "alive", "killed", "broken"

Report = Callable[[int, int, str], None]  # done, total, the last one's id


class TeethError(EngineError):
    """The run itself is at fault: a check fails without a fault, or gives no answer."""


@dataclass(frozen=True)
class Answer:
    """What one check said of one fault.

    Args:
        status: ALIVE or KILLED.
        by: the failing test, or what else ended it.
        named: (operator, tap, layer), where the suite names one.
        levels: where verify failed, in its own words.
    """

    label: str
    status: str
    by: str
    why: str
    named: tuple[str, str, int] | None
    levels: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Result:
    """All that is known of one planted fault.

    Args:
        build: trees.OK, trees.STILLBORN or trees.EQUAL; only OK is asked anything.
    """

    id: str
    build: str
    answers: tuple[Answer, ...]


class Cache:
    """Answers by key, in a file that grows by a line at a time.

    Args:
        path: None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._content: dict[str, Any] = {}
        self._lock = Lock()
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                if not line.endswith("}"):
                    continue  # the run was stopped while it wrote this one
                entry = json.loads(line)
                self._content[entry["key"]] = entry["content"]

    def get(self, key: str) -> Any:
        """What is known, or None."""
        return self._content.get(key)

    def put(self, key: str, content: Any) -> None:
        """Keeps it."""
        with self._lock:
            self._content[key] = content
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "content": content}) + "\n")


def run(
    planted: Sequence[Planted],
    device: str,
    cache: Cache,
    jobs: int = 1,
    report: Report | None = None,
    root: Path = ROOT,
) -> list[Result]:
    """Tries every fault of one device.

    Args:
        jobs: faults under work at a time.

    Returns:
        A result for each, in their order.

    Raises:
        CatalogueError: an edit does not apply.
        BuildError: the unmutated tree does not compile, or a fault made by hand does not.
        TeethError: a check fails on the unmutated tree, or gives no answer.
    """
    keys = Keys(root)
    results: list[Result] = []
    with _arena(root, device, jobs, keys, cache) as arena, ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(arena.try_one, each) for each in planted]
        try:
            for future in waiting:
                results.append(future.result())
                if report is not None:
                    report(len(results), len(planted), results[-1].id)
        finally:
            for future in waiting:
                future.cancel()
    return results


@contextmanager
def _arena(root: Path, device: str, jobs: int, keys: Keys, cache: Cache):
    with TemporaryDirectory(prefix="touchstone-teeth-") as folder:
        servers: SimpleQueue[_Server] = SimpleQueue()
        all_servers = [_Server() for _ in range(jobs)]
        try:
            for server in all_servers:
                servers.put(server)
            make = MAKE_WITH_CUDA if device == GPU else MAKE
            yield _Arena(root, Path(folder), make, servers, keys, cache)
        finally:
            for server in all_servers:
                server.close()


class _Arena:
    """The unmutated tree, a place for others, and servers to ask them."""

    def __init__(
        self,
        root: Path,
        folder: Path,
        make: tuple[str, ...],
        servers: "SimpleQueue[_Server]",
        keys: Keys,
        cache: Cache,
    ) -> None:
        self._root = root
        self._folder = folder
        self._make = make
        self._servers = servers
        self._keys = keys
        self._cache = cache
        self._pristine: Tree | None = None
        self._lock = Lock()
        self._control_locks: dict[Check, Lock] = {}

    def try_one(self, planted: Planted) -> Result:
        """Everything that is asked of one fault, from the cache as far as it goes."""
        tree: Tree | None = None
        build = self._cache.get(self._keys.of_build(planted))
        answers: list[Answer] = []
        try:
            if build is None:
                tree, build = self._plant(planted)
                self._cache.put(self._keys.of_build(planted), build)
            if build != trees.OK and planted.group != GENERATED:
                raise TeethError(f"{planted.id}: {build}")
            for check in planted.checks if build == trees.OK else ():
                key = self._keys.of_answer(planted, check)
                found = self._cache.get(key)
                if found is None:
                    self._control(check)
                    if tree is None:
                        tree, _ = self._plant(planted)
                    found = self._ask(tree, check)
                    self._cache.put(key, found)
                answers.append(_answer(check, found))
                if answers[-1].status == KILLED and not planted.wants_all:
                    break
            return Result(planted.id, build, tuple(answers))
        finally:
            if tree is not None:
                shutil.rmtree(tree.root)

    def _plant(self, planted: Planted) -> tuple[Tree, str]:
        name = hashlib.sha256(planted.id.encode()).hexdigest()[:16]
        return trees.plant(self._unmutated(), self._folder, name, planted.edit)

    def _unmutated(self) -> Tree:
        with self._lock:
            if self._pristine is None:
                self._pristine = trees.pristine_tree(self._root, self._folder, self._make)
            return self._pristine

    def _control(self, check: Check) -> None:
        """The check on the unmutated tree, once, before any fault meets it."""
        with self._lock:
            lock = self._control_locks.setdefault(check, Lock())
        key = self._keys.of_answer(None, check)
        with lock:
            if self._cache.get(key) is not None:
                return
            found = self._ask(self._unmutated(), check)
            if found["status"] != ALIVE:
                why = f"{found['by']}: {found['why']}"
                raise TeethError(f"{check.label} fails without a fault: {why}")
            self._cache.put(key, found)

    def _ask(self, tree: Tree, check: Check) -> dict[str, Any]:
        server = self._servers.get()
        try:
            found = server.ask(tree, self._unmutated(), check)
        finally:
            self._servers.put(server)
        if found["status"] == BROKEN:
            raise TeethError(f"{check.label} gives no answer: {found['why']}")
        return found


def _answer(check: Check, found: dict[str, Any]) -> Answer:
    return Answer(
        check.label,
        found["status"],
        found["by"],
        found["why"],
        found["named"] and tuple(found["named"]),
        tuple(found["levels"]),
        found["seconds"],
    )


class _Server:
    """One fork server, started when it is first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, tree: Tree, pristine: Tree, check: Check) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(FORK_SERVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
            if self._process.stdout.readline() != "ready\n":
                raise TeethError("the fork server does not start")
        request = {
            "tree": str(tree.root),
            "pristine": str(pristine.root),
            "check": check.request,
            "cpu": check.cpu,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise TeethError("the fork server is gone")
        return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
