"""Runs the plan: plants, builds and asks, several faults at a time, and keeps every answer.

Decides the order of work and what is asked again; what an answer is worth is matrix.py's. Answers
are kept one per line as they come, so that a run that was stopped goes on where it was.
Invariant: a check has passed on the unmutated tree before any fault meets it.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Semaphore
from typing import Any

from verification.evidence import Place, this_place
from verification.json_lines import append_line, read_lines
from verification.mutants.build import MAKE, ROOT, Tree
from verification.mutants.faults import GPU
from verification.teeth import trees
from verification.teeth.checks import Check
from verification.teeth.keys import Keys
from verification.teeth.plan import GENERATED, Planted
from verification.teeth.servers import Servers, TeethError, servers

PARALLEL_MAKE = (*MAKE, f"-j{os.cpu_count()}")
MAKE_WITH_CUDA = tuple(word for word in PARALLEL_MAKE if word != "CUDA=none")
ALIVE, KILLED = "alive", "killed"
LOOK_SECONDS = 1  # how often a fault looks for idle servers
# A check that takes longer than this without a fault is ended: seconds of processor.
LIMIT = 600
# And with one, than this: so many times as long, and some seconds more.
LIMIT_FACTOR, LIMIT_SECONDS = 8, 10
PHASE_FACTOR, PHASE_SECONDS = 3, 5  # of one test on a GPU

PROBLEM = "no answer"
Report = Callable[[int, int, str], None]  # done, total, the last one's id or its PROBLEM


class RunError(TeethError):
    """What a run came to all the same, and how many problems it met."""

    def __init__(self, message: str, results: list["Result"], num_problems: int) -> None:
        super().__init__(message)
        self.results = results
        self.num_problems = num_problems


@dataclass(frozen=True)
class Answer:
    """What one check said of one fault.

    Args:
        status: ALIVE or KILLED.
        by: the failing test, or what else ended it.
        named: (operator, tap, layer), where the suite names one.
        levels: where verify failed, in its own words; of properties, the tests that failed.
        place: the cache's key of the machine that answered.
    """

    label: str
    status: str
    by: str
    why: str
    named: tuple[str, str, int] | None
    levels: tuple[str, ...]
    seconds: float
    place: str = ""


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
        for entry in () if path is None else read_lines(path):
            self._content[entry["key"]] = entry["content"]

    def get(self, key: str) -> Any:
        """What is known, or None."""
        return self._content.get(key)

    def put(self, key: str, content: Any) -> None:
        """Keeps it."""
        with self._lock:
            self._content[key] = content
            if self._path is not None:
                append_line(self._path, {"key": key, "content": content})


def run(
    planted: Sequence[Planted],
    device: str,
    cache: Cache,
    jobs: int = 1,
    report: Report | None = None,
    root: Path = ROOT,
    seconds: float = math.inf,
    place: Callable[[], Place] = this_place,
) -> list[Result]:
    """Tries every fault of one device.

    Args:
        jobs: faults under work at a time.
        seconds: what has not begun by then is left out.
        place: tells where this run's own answers are found; the cache may hold other machines'.

    Returns:
        A result for each that was not left out, in their order.

    Raises:
        CatalogueError: an edit does not apply.
        BuildError: the unmutated tree does not compile, or a fault made by hand does not.
        RunError: checks fail on the unmutated tree, or give no answer; all are named, when all
            that does not need them is done.
    """
    results: list[Result] = []
    problems: list[str] = []
    with _arena(root, device, jobs, cache, place) as arena, ThreadPoolExecutor(jobs) as pool:
        end = time.monotonic() + seconds
        waiting = [pool.submit(arena.try_one, each, end) for each in planted]
        try:
            for number, (each, future) in enumerate(zip(planted, waiting, strict=True), start=1):
                what = each.id
                try:
                    results += future.result()
                except TeethError as error:
                    problems.append(str(error))
                    what = f"{PROBLEM}: {each.id}: {error}"
                if report is not None:
                    report(number, len(planted), what)
        except KeyboardInterrupt:
            arena.stop()
            raise
        finally:
            for future in waiting:
                future.cancel()
    if problems:
        raise RunError("\n".join(dict.fromkeys(problems)), results, len(set(problems)))
    return results


@contextmanager
def _arena(root: Path, device: str, jobs: int, cache: Cache, place: Callable[[], Place]):
    with (
        TemporaryDirectory(prefix="touchstone-teeth-") as folder,
        servers(jobs, has_torch=device != GPU) as asked,
        ThreadPoolExecutor(jobs) as pool,
    ):
        make = MAKE_WITH_CUDA if device == GPU else PARALLEL_MAKE
        yield _Arena(root, Path(folder), make, asked, pool, Semaphore(jobs), cache, place)


class _Arena:
    """The unmutated tree, a place for others, and servers to ask them."""

    def __init__(
        self,
        root: Path,
        folder: Path,
        make: tuple[str, ...],
        asked: Servers,
        pool: ThreadPoolExecutor,
        idle: Semaphore,
        cache: Cache,
        place: Callable[[], Place],
    ) -> None:
        self._root = root
        self._folder = folder
        self._make = make
        self._servers = asked
        self._pool = pool
        self._idle = idle
        self._keys = Keys(root)
        self._cache = cache
        self._place = place
        self._place_key: str | None = None
        self._pristine: Tree | None = None
        self._lock = Lock()
        self._control_locks: dict[Check, Lock] = {}
        self._bad_controls: dict[Check, TeethError] = {}

    def try_one(self, planted: Planted, end: float) -> list[Result]:
        """Everything that is asked of one fault, from the cache as far as it goes.

        Args:
            end: of time.monotonic(); later nothing is begun.
        """
        if time.monotonic() > end:
            return []
        plot = _Plot(planted, self._plant)
        try:
            key = self._keys.of_build(planted)
            build = self._cache.get(key)
            if build is None:
                build = plot.build
                self._cache.put(key, build)
            if build != trees.OK and planted.group != GENERATED:
                raise TeethError(f"{planted.id}: {build}")
            answers = self._answers(plot) if build == trees.OK else []
            return [Result(planted.id, build, tuple(answers))]
        finally:
            plot.clear()

    def stop(self) -> None:
        """Ends what is being asked: it has no answer."""
        self._servers.stop()

    def _answers(self, plot: "_Plot") -> list[Answer]:
        """In level order, up to the first that kills, or all that are wanted.

        One after another while other faults want the servers; ahead of their turn on idle ones, or
        the last survivors, who meet every check, would keep one core busy and leave the rest idle.
        """
        todo, asked, answers = deque(plot.planted.checks), deque[Future[Answer]](), []
        try:
            while todo or asked:
                while todo and self._idle.acquire(blocking=not asked):
                    asked.append(self._pool.submit(self._answer, plot, todo.popleft()))
                    asked[-1].add_done_callback(lambda _: self._idle.release())
                if wait([asked[0]], LOOK_SECONDS).not_done:
                    continue
                answers.append(asked.popleft().result())
                if plot.is_over(answers[-1]):
                    break
            return answers
        finally:
            wait([each for each in asked if not each.cancel()])  # they need the tree

    def _answer(self, plot: "_Plot", check: Check) -> Answer:
        key = self._keys.of_answer(plot.planted, check)
        found = self._cache.get(key)
        if found is None:
            control = self._control(check)
            limit = LIMIT_SECONDS + LIMIT_FACTOR * control["cpu"]
            phase = None
            if plot.planted.device == GPU:  # a kernel that waits for ever hinders all the others
                phase = PHASE_SECONDS + PHASE_FACTOR * control["phase"]
            found = self._servers.ask(plot.tree, self._unmutated(), check, limit, phase)
            found["place"] = self._this_place()
            self._cache.put(key, found)
        return Answer(
            check.label,
            found["status"],
            found["by"],
            found["why"],
            found["named"] and tuple(found["named"]),
            tuple(found["levels"]),
            found["seconds"],
            found.get("place", ""),
        )

    def _control(self, check: Check) -> dict[str, Any]:
        """The check on the unmutated tree, once, before any fault meets it."""
        with self._lock:
            lock = self._control_locks.setdefault(check, Lock())
        key = self._keys.of_answer(None, check)
        with lock:
            found = self._cache.get(key)
            if found is None:
                if check in self._bad_controls:
                    raise self._bad_controls[check]
                try:
                    found = self._ask_control(check)
                except TeethError as error:
                    self._bad_controls[check] = error
                    raise
                self._cache.put(key, found)
            return found

    def _ask_control(self, check: Check) -> dict[str, Any]:
        pristine = self._unmutated()
        found = self._servers.ask(pristine, pristine, check, LIMIT)
        if found["status"] != ALIVE:
            why = f"{found['by']}: {found['why']}"
            raise TeethError(f"{check.label} fails without a fault: {why}")
        return found

    def _plant(self, planted: Planted) -> tuple[Tree, str]:
        name = hashlib.sha256(planted.id.encode()).hexdigest()[:16]
        return trees.plant(self._unmutated(), self._folder, name, planted.edit)

    def _this_place(self) -> str:
        """The key under which the cache has this machine."""
        with self._lock:
            if self._place_key is None:
                place = self._place()
                digest = hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()
                self._place_key = f"place {digest[:12]}"
                self._cache.put(self._place_key, place)
            return self._place_key

    def _unmutated(self) -> Tree:
        with self._lock:
            if self._pristine is None:
                self._pristine = trees.pristine_tree(self._root, self._folder, self._make)
            return self._pristine


class _Plot:
    """A fault and its tree, which is made when it is first needed, and once."""

    def __init__(self, planted: Planted, plant: Callable[[Planted], tuple[Tree, str]]) -> None:
        self.planted = planted
        self._plant = plant
        self._made: tuple[Tree, str] | None = None
        self._lock = Lock()

    @property
    def tree(self) -> Tree:
        """Where it is planted."""
        return self._get()[0]

    @property
    def build(self) -> str:
        """What the compiler says of it."""
        return self._get()[1]

    def is_over(self, answer: Answer) -> bool:
        """Whether nothing more has to be asked."""
        return answer.status == KILLED and not self.planted.wants_all

    def clear(self) -> None:
        """Takes the tree away."""
        if self._made is not None:
            shutil.rmtree(self._made[0].root)

    def _get(self) -> tuple[Tree, str]:
        with self._lock:
            if self._made is None:
                self._made = self._plant(self.planted)
            return self._made
