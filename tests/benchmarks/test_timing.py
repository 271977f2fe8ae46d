import pytest

from tests.benchmarks.timing import Interleaved, Spread, noise, time_once


class Clock:
    """Seconds that pass only while something runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float):
        def call() -> None:
            self.now += seconds

        return call


def test_a_call_takes_what_the_clock_says():
    clock = Clock()

    assert time_once(clock.work(2.0), clock) == 2.0


def test_what_a_first_call_pays_after_others_is_not_timed():
    clock, seconds = Clock(), iter((5.0, 2.0))

    assert time_once(lambda: clock.work(next(seconds))(), clock) == 2.0


def test_a_call_that_tells_its_own_seconds_is_believed():
    clock = Clock()

    assert time_once(lambda: clock.work(2.0)() or 0.5, clock) == 0.5
    assert time_once(lambda: clock.work(2.0)() or 0.0, clock) == 0.0


def test_calls_take_turns():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    rounds = Interleaved(calls, Clock())

    for _ in range(3):
        rounds.turn()

    assert "".join(order) == "aabbcc" * 3


def test_times_are_milliseconds_times_the_scale_and_warm_up_is_forgotten():
    clock = Clock()
    rounds = Interleaved({"a": clock.work(0.5)}, clock, scale=1 / 10)
    rounds.turn()
    rounds.forget()
    rounds.turn()

    assert rounds.spreads()["a"].rounds == (50.0,)


def test_the_noise_of_equal_runs_is_their_spread_and_of_unlike_ones_their_distance():
    steady, other = Spread((1.0,) * 7), Spread((1.1,) * 7)
    wide = Spread((0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.3))

    assert noise(steady, steady) == 0.0
    assert noise(other, steady) == pytest.approx(0.1)
    assert noise(steady, wide) > 0.05
