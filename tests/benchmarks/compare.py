"""Holds a run of the benchmarks to a stored one: fails on a regression beyond the measured noise.

Where the run timed a base (another build of the engine, by turns with this one) the two are
compared inside the run; else, or where --against names one, with the stored medians. Noise is what
the run and the stored one measured of themselves, the same engine twice, and at least what two
engines of one build are apart, in one process or in two. `python -m tests.benchmarks.compare`, make
bench-compare. Exit status: 0 no regression, 1 one, or a point that cannot be compared.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "build" / "bench.json"
STORED = ROOT / "golden" / "h200" / "record.json"
OURS, BASE = "touchstone", "base"
# Two engines of one build, each with memory of its own: up to 1.3 % apart at four points, where one
# engine repeats itself within 0.3 % (an H200, docs/log.md).
BETWEEN_ENGINES = 0.015


@dataclass(frozen=True)
class Difference:
    """One point: new over old median, and how far chance alone can move it."""

    point: str
    old: float  # ms
    new: float  # ms
    noise: float  # a share
    against: str  # "base in the same run" or "stored run"

    @property
    def is_regression(self) -> bool:
        """Slower by more than the noise."""
        return self.new > self.old * (1 + self.noise)

    def __str__(self) -> str:
        """One line."""
        word = "SLOWER" if self.is_regression else "ok"
        change = 100 * (self.new / self.old - 1)
        return (
            f"{self.point:<22} {self.old:8.4f} -> {self.new:8.4f} ms  {change:+6.2f} % "
            f"(noise {100 * self.noise:.2f} %)  {word}, {self.against}"
        )


def load(path: Path) -> dict:
    """A run: bench.json, or the benchmarks of a GPU's record.

    Raises:
        ValueError: there is no such file, or it holds no points.
    """
    if not path.exists():
        raise ValueError(f"{path.name} is not there: no GPU was timed (make bench-gpu, on one)")
    content = json.loads(path.read_text(encoding="utf-8"))
    run = content.get("benchmarks", content)
    if not run.get("points"):
        raise ValueError(f"{path.name} holds no benchmark points: {run.get('reason', 'none')}")
    return run


def differences(run: dict, stored: dict | None) -> list[Difference]:
    """Every point that both have; without a stored run, every point that timed a base."""
    old_points = {point["name"]: point for point in (stored or {"points": []})["points"]}
    found = []
    for point in run["points"]:
        contestants, name = point["contestants"], point["name"]
        new = contestants[OURS]["median"]
        if stored is None and "median" in contestants.get(BASE, {}):
            base = contestants[BASE]
            spread = (base["p90"] - base["p10"]) / 2 / base["median"]
            chance = max(point["noise"], spread, BETWEEN_ENGINES)
            found.append(Difference(name, base["median"], new, chance, "base in the same run"))
        elif name in old_points:
            old = old_points[name]
            chance = max(point["noise"] + old["noise"], BETWEEN_ENGINES)
            median = old["contestants"][OURS]["median"]
            found.append(Difference(name, median, new, chance, "stored run"))
    return found


def not_timed(run: dict, stored: dict | None) -> list[str]:
    """Stored points that the run has not."""
    timed = {point["name"] for point in run["points"]}
    return [p["name"] for p in (stored or {"points": []})["points"] if p["name"] not in timed]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compare", description=__doc__)
    parser.add_argument("--run", type=Path, default=RUN, help="default: %(default)s")
    parser.add_argument("--against", type=Path, help=f"default: the run's own base, or {STORED}")
    options = parser.parse_args(arguments)
    try:
        run = load(options.run)
        has_base = any(BASE in point["contestants"] for point in run["points"])
        stored = None if has_base and not options.against else load(options.against or STORED)
    except (OSError, ValueError) as error:
        print(f"error: {error}")
        return 1
    found, missing = differences(run, stored), not_timed(run, stored)
    print("\n".join(map(str, found)) or "error: the runs have no point in common")
    for name in missing:
        print(f"error: {name} is stored, and was not timed again")
    if has_failed := run.get("status") == "fail":
        print("error: the run failed: a point is missing, or what was timed is wrong")
    is_worse = any(each.is_regression for each in found)
    return 1 if not found or missing or has_failed or is_worse else 0


if __name__ == "__main__":
    sys.exit(main())
