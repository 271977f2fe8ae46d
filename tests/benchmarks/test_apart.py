"""Contestants in processes of their own: made-up ones, that count, fail and die."""

import functools
import os
import time

import numpy as np
import pytest

from tests.benchmarks.peers import apart
from tests.benchmarks.peers.apart import COMPILE_THREADS, Apart, PeerError
from tests.benchmarks.points import Point
from tests.benchmarks.timing import Interleaved

ONE, TWO = Point("decode", 1, 4, 1.0, 3), Point("decode", 2, 4, 1.0, 5)


class Counter:
    """Counts its runs; fails at some."""

    steps = 2

    def __init__(self, failing_run: int = 0, dying_run: int = 0) -> None:
        self.runs = 0
        self.failing_run, self.dying_run = failing_run, dying_run

    def prepare(self, point: Point, prompts: np.ndarray) -> None:
        self.prompts = prompts

    def run(self) -> None:
        self.runs += 1
        if self.runs == self.failing_run:
            raise RuntimeError("no room\nand more")
        if self.runs == self.dying_run:
            os._exit(7)

    def token_ids(self) -> np.ndarray:
        environment = int(os.environ[COMPILE_THREADS])
        return np.array([[self.runs, int(self.prompts.sum()), os.getpid(), environment]])


def prompts(point: Point) -> np.ndarray:
    return np.full((point.batch, point.context), 3)


def seconds() -> float:
    """A clock that goes forward by a second whenever somebody looks."""
    seconds.now = getattr(seconds, "now", 0.0) + 1.0
    return seconds.now


@pytest.fixture
def made():
    all_made = []

    def make(**failures: int) -> Apart:
        factory = functools.partial(Counter, **failures)
        all_made.append(Apart("counter", factory, seconds, (ONE, TWO), prompts))
        return all_made[-1]

    yield make
    for each in all_made:
        each.close_all()


def test_each_point_has_a_process_that_is_ready_before_it_is_asked_and_ends_after(made):
    peer, ids = made(), {}

    for point in (ONE, TWO):
        peer.prepare(point, prompts(point))
        assert (peer.steps, peer.ready_seconds >= 0) == (2, True)
        peer.run()
        ids[point] = peer.token_ids()[0]
        peer.close()

    runs, sums, processes, environments = zip(*ids.values(), strict=True)
    assert runs == (3, 3)  # two before it is ready: the first one compiles
    assert sums == (12, 24)
    assert len({*processes, os.getpid()}) == 3
    assert set(environments) == {max(1, os.cpu_count() // 2)}  # the cores, shared by two points
    assert COMPILE_THREADS not in os.environ
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_the_process_tells_the_seconds_by_its_own_clock(made):
    peer = made()
    peer.prepare(ONE, prompts(ONE))
    rounds = Interleaved({"peer": peer.run}, time.perf_counter)

    rounds.turn()

    assert rounds.spreads()["peer"].rounds == (1000.0,)


def test_who_fails_to_get_ready_is_told_at_its_point(made):
    peer = made(failing_run=1)

    peer.wait()

    for point in (ONE, TWO):
        with pytest.raises(PeerError, match="^RuntimeError: no room$"):
            peer.prepare(point, prompts(point))


def test_a_process_that_dies_is_told_and_no_other_is_harmed(made):
    peer = made(dying_run=3)
    peer.prepare(ONE, prompts(ONE))

    with pytest.raises(PeerError, match="its process ended, exit status 7"):
        peer.run()
    with pytest.raises(PeerError, match="its process ended"):
        peer.token_ids()

    peer.prepare(TWO, prompts(TWO))
    assert peer.token_ids()[0][0] == 2


def test_who_does_not_get_ready_in_time_is_ended(made, monkeypatch):
    monkeypatch.setattr(apart, "READY_SECONDS", 0.0)
    peer = made()

    with pytest.raises(PeerError, match="no answer within 0 s"):
        peer.prepare(ONE, prompts(ONE))


def test_a_point_that_was_not_announced_is_refused(made):
    with pytest.raises(PeerError, match="made ready for decode B=1, 4; decode B=2, 4 alone"):
        made().prepare(Point("prefill", 1, 4, 1.0), prompts(ONE))
