"""A run of the benchmarks as a table in Markdown and as a plot.

`python -m tests.benchmarks.table` reads golden/h200/record.json, prints the table and writes
docs/benchmarks.svg (make bench-table). A miss is shown as one; a peer that was not run says so.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.compare import OURS, ROOT, STORED, load
from tests.benchmarks.points import TARGETS

PLOT = ROOT / "docs" / "benchmarks.svg"
COLOURS = ("#1f6f5c", "#8a8f98", "#c58b3b", "#5b6fae", "#b0584f")


def peers_of(run: dict) -> list[str]:
    """The contestants that are not this engine, in the order of the run."""
    names = (name for point in run["points"] for name in point["contestants"])
    return [name for name in dict.fromkeys(names) if not name.startswith(OURS)]


def markdown(run: dict) -> str:
    """The table; medians, and for this engine half the spread between 10 and 90 %."""
    peers = peers_of(run)
    head = ["point", "touchstone, ms", "wanted", "floor", "share of limit", *peers]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for point in run["points"]:
        mine = point["contestants"][OURS]
        missed = "" if mine["median"] <= point["target"] else " (missed)"
        cells = [
            point["name"],
            f"**{mine['median']:.3f}** ± {(mine['p90'] - mine['p10']) / 2:.3f}",
            f"≤ {point['target']:g}{missed}",
            f"{point['floor']:.3f}",
            f"{100 * point['share_of_limit']:.0f} %",
            *(_peer(point["contestants"].get(peer)) for peer in peers),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_notes(run)]) + "\n"


def _peer(found: dict | None) -> str:
    if found is None or "not run" in found:
        return "not run"
    return f"{found['median']:.3f}" + (" (other output)" if found["outputs"] != "ok" else "")


def _notes(run: dict) -> list[str]:
    limits, first, memory = run["limits"], run["first_token"], run["memory"]
    load_target, memory_target = TARGETS.values()
    beyond = memory["beyond"] / 1e6
    return [
        f"Limits measured in this run: {limits['read'] / 1e12:.2f} TB/s read, "
        f"{limits['multiply'] / 1e12:.0f} TFLOP/s (8192³ bf16 through cuBLAS). "
        f"Clocks {run['clocks_before']['clocks.sm']} before, {run['clocks_after']['clocks.sm']} "
        "after.",
        f"Load from the page cache {first['load']:.2f} s (wanted ≤ {load_target:g}); first token "
        f"{first['total']:.2f} s after the process started.",
        f"Device memory beyond weights and KV pool at B=256 and 8k tokens a step: {beyond:.0f} MB "
        f"(wanted ≤ {memory_target:g}).",
    ]


def plot(run: dict, path: Path) -> None:
    """Milliseconds of every contestant at every point, on a logarithmic axis; an SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "touchstone"  # the same run is the same file
    from matplotlib import pyplot

    points, names = run["points"], [OURS, *peers_of(run)]
    figure, axes = pyplot.subplots(figsize=(9, 0.62 * len(points) + 1))
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        for row, point in enumerate(points):
            found = point["contestants"].get(name, {"not run": ""})
            if "not run" in found:
                continue
            at = row + (index - (len(names) - 1) / 2) * height
            ends = [[found["median"] - found["p10"]], [found["p90"] - found["median"]]]
            label = name if row == _first_row(points, name) else None
            colour = COLOURS[index % len(COLOURS)]
            axes.barh(at, found["median"], height, color=colour, label=label)
            axes.errorbar(found["median"], at, xerr=ends, color="#222222", linewidth=0.8)
    for row, point in enumerate(points):
        axes.plot([point["floor"]] * 2, [row - 0.42, row + 0.42], color="#222222", linewidth=1.2)
    axes.set_yticks(range(len(points)), [point["name"] for point in points])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms (decode: per step; prefill: per prompt); the line is the card's limit")
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _first_row(points: Sequence[dict], name: str) -> int | None:
    rows = (row for row, p in enumerate(points) if "median" in p["contestants"].get(name, {}))
    return next(rows, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.table", description=__doc__)
    parser.add_argument("--run", type=Path, default=STORED, help="default: %(default)s")
    parser.add_argument("--plot", type=Path, default=PLOT, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        run = load(options.run)
    except (OSError, ValueError) as error:
        print(f"error: {error}")
        return 1
    print(markdown(run), end="")
    plot(run, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
