"""Contestants in processes of their own, one for each point, made ready all at the same time.

A fault on the device ends every program of the process that it happens in, and what a compiler
holds is one state for the whole process. So who compiles lives apart: its fault is a line in the
table. The process times its own calls: the pipe is not in the figure. Knows no model and no device.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection

import numpy as np

from tests.benchmarks.points import Point
from tests.benchmarks.timing import Clock

READY_SECONDS = 150.0  # from the start of the processes; compiling takes a minute or more
ANSWER_SECONDS = 60.0  # of a timed call, the slowest of which takes a second
# Of torch's compiler, which by default starts as many workers as there are cores, in each process.
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"


class PeerError(Exception):
    """What a contestant said when it failed, or that its process ended."""


class Apart:
    """A Contestant whose points are processes.

    Args:
        name: as tables show it.
        make: makes the contestant, in each process. This, the clock and prompts_of are pickled.
        clock: of each process; see timing.Clock.
        points: those that it will be asked to prepare.
        prompts_of: point -> prompts.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], object],
        clock: Clock,
        points: Sequence[Point],
        prompts_of: Callable[[Point], np.ndarray],
    ) -> None:
        self.name = name
        self._points = "; ".join(point.name for point in points) or "no point"
        self._began = time.monotonic()
        threads = max(1, (os.cpu_count() or 1) // max(1, len(points)))
        environment = {COMPILE_THREADS: str(threads)}
        self._of = {
            point: _Process(environment, make, clock, point, prompts_of) for point in points
        }
        self._current: _Process | None = None

    def wait(self) -> None:
        """Until every point is ready or has failed: what compiles disturbs what is timed."""
        for process in self._of.values():
            process.wait(self._began + READY_SECONDS - time.monotonic())

    def prepare(self, point: Point, prompts: np.ndarray) -> None:
        """See Contestant; its process has the same prompts.

        Raises:
            PeerError: it failed to get ready, or not in time.
        """
        if point not in self._of:
            raise PeerError(f"made ready for {self._points} alone")
        self.close()
        self.wait()
        self._current = self._of.pop(point)
        self.steps, self.ready_seconds = self._current.ready()

    def run(self) -> float:
        """The timed call; the seconds that it took by its process's clock."""
        return self._current.ask("run")

    def token_ids(self) -> np.ndarray:
        """See Contestant."""
        return self._current.ask("token_ids")

    def close(self) -> None:
        """End this point's process."""
        if self._current is not None:
            self._current.close()
            self._current = None

    def close_all(self) -> None:
        """End every process."""
        self.close()
        for process in self._of.values():
            process.close()


class _Process:
    """This side of one process."""

    def __init__(self, environment: Mapping[str, str], *task: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.send(task)
        self._outcome: tuple[str, object] | None = None

    def wait(self, seconds: float) -> None:
        """For what it says of getting ready."""
        if self._outcome is None:
            self._outcome = self._answer(seconds)

    def ready(self) -> tuple[int, float]:
        """Steps of a timed call, and how many seconds it took to get ready."""
        return self._value(self._outcome)

    def ask(self, what: str) -> object:
        """One answer."""
        try:
            self._pipe.send(what)
        except OSError:
            pass  # it has ended: the answer says so
        return self._value(self._answer(ANSWER_SECONDS))

    def _answer(self, seconds: float) -> tuple[str, object]:
        seconds = max(seconds, 0.0)
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return "failed", f"its process ended, exit status {self._process.exitcode}"
        self._process.kill()
        return "failed", f"no answer within {seconds:.0f} s"

    @staticmethod
    def _value(outcome: tuple[str, object]) -> object:
        word, value = outcome
        if word == "failed":
            raise PeerError(value)
        return value

    def close(self) -> None:
        self._pipe.close()  # which ends its loop
        self._process.join(10)
        self._process.kill()


def _serve(pipe: Connection, environment: Mapping[str, str]) -> None:
    """The process: gets one point ready, then does what it is asked until the pipe ends."""
    os.environ.update(environment)  # before anything of the contestant is imported
    try:
        make, clock, point, prompts_of = pipe.recv()
        began = time.monotonic()
        contestant = make()
        contestant.prepare(point, prompts_of(point))
        contestant.run()  # the first one compiles
        contestant.run()
        clock()
        pipe.send(("done", (getattr(contestant, "steps", point.steps), time.monotonic() - began)))
        while True:
            if pipe.recv() == "token_ids":
                pipe.send(("done", contestant.token_ids()))
                continue
            began = clock()
            contestant.run()
            pipe.send(("done", clock() - began))
    except (EOFError, ConnectionError):  # nobody asks any more
        return
    except Exception as error:  # whatever a peer may raise; it is told in the table
        words = [type(error).__name__, *str(error).splitlines()[:1]]
        pipe.send(("failed", ": ".join(words)[:200]))
