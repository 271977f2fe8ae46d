"""Interleaved rounds on a synchronised clock: A B C A B C, and A twice to see what noise is.

Before it is timed, everybody calls once untimed: who ran before, in another process perhaps, has
left the card's caches and clocks as suits itself, and a call of 2 ms pays for that.

Knows calls and seconds; knows neither models nor devices. `clock` comes from whoever knows the
device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Clock = Callable[[], float]  # seconds; waits until the device is idle before it looks


@dataclass(frozen=True)
class Spread:
    """Times of one contestant at one point, in milliseconds per step.

    Args:
        rounds: as measured, in order.
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return float(np.median(self.rounds))

    @property
    def low(self) -> float:
        """A tenth is below."""
        return float(np.percentile(self.rounds, 10))

    @property
    def high(self) -> float:
        """A tenth is above."""
        return float(np.percentile(self.rounds, 90))

    def to_json(self) -> dict:
        """As in bench.json."""
        return {
            "median": round(self.median, 5),
            "p10": round(self.low, 5),
            "p90": round(self.high, 5),
            "rounds": len(self.rounds),
        }


def time_once(call: Callable[[], float | None], clock: Clock) -> float:
    """Seconds of the second of two calls: its own where it tells them, having its own clock."""
    call()
    began = clock()
    own = call()
    ended = clock()
    return ended - began if own is None else own


class Interleaved:
    """Times some calls by turns; one `turn` times each once, in order.

    Args:
        calls: by name.
        clock: see Clock.
        scale: milliseconds are multiplied by it, e.g. 1 / steps.
    """

    def __init__(
        self, calls: Mapping[str, Callable[[], float | None]], clock: Clock, scale: float = 1.0
    ) -> None:
        self._calls = dict(calls)
        self._clock = clock
        self._scale = scale
        self._times: dict[str, list[float]] = {name: [] for name in calls}

    def turn(self) -> None:
        """Every call once untimed and once timed."""
        for name, call in self._calls.items():
            self._times[name].append(1e3 * self._scale * time_once(call, self._clock))

    def forget(self) -> None:
        """Drops what was measured so far: it was warm-up."""
        for times in self._times.values():
            times.clear()

    def spreads(self) -> dict[str, Spread]:
        """By name."""
        return {name: Spread(tuple(times)) for name, times in self._times.items()}


def noise(one: Spread, again: Spread) -> float:
    """How far two measurements of the same thing are apart, as a share; at least each one's spread.

    Half the distance from the tenth to the ninetieth percentile stands for a run's spread.
    """
    apart = abs(one.median / again.median - 1)
    return max(apart, *((s.high - s.low) / 2 / s.median for s in (one, again)))
