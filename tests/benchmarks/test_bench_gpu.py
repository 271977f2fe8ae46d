"""The engine on a GPU at every point of points.py, its peers by turns with it in the same run.

One test is one point: pytest-benchmark times this engine, and before each of its rounds every other
contestant runs once, so A B C A B C; this engine is one of the others too, which tells the noise.
What the timed calls left behind is checked. The results are written to build/bench.json. Peers are
chosen by $BENCH_PEERS; $BENCH_BASE names another checkout of this engine, built, as a contestant.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.bindings import CSRC, Library
from engine.config import EngineConfig, ModelConfig
from engine.models import resolve
from engine.source_stamp import source_stamp
from tests.benchmarks import gpu
from tests.benchmarks.contestants import (
    Contestant,
    Touchstone,
    agreement,
    prompts_of,
    room_for,
)
from tests.benchmarks.peers.apart import Apart, PeerError
from tests.benchmarks.points import MODEL, POINTS, Limits, Point, floor_ms
from tests.benchmarks.timing import Interleaved, Spread, noise
from verification.gpu_record import gpu_source_stamp

ROUNDS = 7
OUTPUT = CSRC.parent / "build" / "bench.json"
PEERS = os.environ.get("BENCH_PEERS", "graph,eager,compiled").split(",")
AGAIN = "touchstone again"  # the same engine among the others
MAX_SHORTFALL = 0.5  # sigma, of a peer's first tokens: ten times bf16's error, an eighth of chance

pytestmark = pytest.mark.gpu


class Session:
    """Everything that lives from the first point to the last, and what was found."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.directory = resolve(MODEL)
        self.config = ModelConfig.from_directory(self.directory)
        self.results: dict = {
            "status": "pass",
            "gpu_source": gpu_source_stamp(),
            "model": MODEL,
            "clocks_before": gpu.clocks(),
            "points": [],
            "kernels": {},
        }
        self.limits: Limits = gpu.measure_limits()
        self.results["limits"] = {"read": self.limits.read, "multiply": self.limits.multiply}
        self.results["first_token"] = gpu.first_token_seconds(self.directory)
        self.library = Library()
        room = room_for(POINTS, "cuda")
        free, _ = torch.cuda.mem_get_info()
        self.ours = Touchstone(self.directory, room, self.library)
        memory = self.ours.runner.engine.memory()
        taken = free - torch.cuda.mem_get_info()[0]
        beyond = taken - memory["weights"] - memory["kv_cache"]
        self.results["memory"] = {**memory, "taken": taken, "beyond": beyond}
        self.others: list[Contestant] = self._others(room, points)

    def _others(self, room: EngineConfig, points: Sequence[Point]) -> list[Contestant]:
        from tests.benchmarks.peers.hugging_face import CompiledTransformers, Transformers
        from tests.benchmarks.peers.torch_graph import TorchGraph

        peers = {"graph": TorchGraph, "eager": Transformers, "compiled": CompiledTransformers}
        self.left_out = [peer.name for key, peer in peers.items() if key not in PEERS]
        others: list[Contestant] = []
        if base := os.environ.get("BENCH_BASE"):
            stamp = source_stamp(Path(base) / "csrc")
            library = Library(Path(base) / "engine" / "libengine.so", expected_stamp=stamp)
            others.append(Touchstone(self.directory, room, library, "base"))
        if "graph" in PEERS:
            others.append(TorchGraph(self.directory))
        if "eager" in PEERS:
            others.append(Transformers(self.directory))
        self.apart: list[Apart] = []
        if "compiled" in PEERS:
            make = functools.partial(CompiledTransformers, self.directory)
            prompts = functools.partial(prompts_of, vocab_size=self.config.vocab_size)
            self.apart.append(Apart(CompiledTransformers.name, make, gpu.clock, points, prompts))
        for each in self.apart:
            each.wait()
        return others + self.apart

    def write(self) -> None:
        """Writes bench.json; a run without every point is not a pass."""
        if len(self.results["points"]) != len(POINTS):
            self.results["status"] = "fail"
        self.results["clocks_after"] = gpu.clocks()
        OUTPUT.parent.mkdir(exist_ok=True)
        OUTPUT.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    if not torch.cuda.is_available() or not Library().has_cuda:
        pytest.skip("requires a CUDA device and a library built with nvcc")
    mine = (item for item in request.session.items if item.module is request.module)
    chosen = [item.callspec.params["point"] for item in mine if hasattr(item, "callspec")]
    made = Session(chosen)
    yield made
    made.write()
    made.ours.close()
    for each in made.apart:
        each.close_all()


@pytest.mark.benchmark(timer=gpu.clock, disable_gc=True)
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_point(benchmark, session: Session, point: Point):
    prompts, ours = prompts_of(point, session.config.vocab_size), session.ours
    ours.prepare(point, prompts)
    ready, missing = _prepare(session.others, point, prompts)
    turns = {AGAIN: ours.run, **{other.name: other.run for other in ready}}
    others = {name: Interleaved({name: call}, gpu.clock) for name, call in turns.items()}
    by_turns = functools.partial(_turn, others, missing)
    for _ in range(2):  # warm-up: compiles, and lets the clocks rise
        ours.run()
        by_turns()
    for other in others.values():
        other.forget()

    def others_then_one_untimed() -> None:
        by_turns()
        ours.run()

    benchmark.group = point.kind
    benchmark.pedantic(ours.run, setup=others_then_one_untimed, rounds=ROUNDS, iterations=1)

    ready = {other: seconds for other, seconds in ready.items() if other.name in others}
    row = _row(session, point, benchmark.stats.stats.data, others, ready)
    missing |= dict.fromkeys(session.left_out, "left out by BENCH_PEERS")
    row["contestants"] |= {name: {"not run": why} for name, why in missing.items()}
    row["checked"] = ours.check(point, prompts)
    row["clocks"] = gpu.clocks()
    for other, seconds in ready.items():
        row["contestants"][other.name] |= _outputs(ours, other)
        row["contestants"][other.name]["ready_seconds"] = round(seconds, 2)
        if not isinstance(other, Touchstone):
            other.close()  # this point's memory
    torch.cuda.empty_cache()
    if point.name in ("decode B=1, 128", "decode B=32, 512", "prefill B=1, 2048"):
        session.results["kernels"][point.name] = gpu.kernel_times(ours.run)[:16]
    session.results["points"].append(row)
    benchmark.extra_info |= {k: row[k] for k in ("floor", "share_of_limit", "target")}
    if not row["checked"]["equal"]:
        session.results["status"] = "fail"
        pytest.fail(f"what was timed is wrong: {row['checked']}")


def _prepare(
    others: list[Contestant], point: Point, prompts: np.ndarray
) -> tuple[dict[Contestant, float], dict[str, str]]:
    """Who is ready for a point after how many seconds, and why the rest is not."""
    ready, missing = {}, {}
    for other in others:
        began = gpu.clock()
        try:
            other.prepare(point, prompts)
            other.run()  # the first one compiles
            ready[other] = getattr(other, "ready_seconds", gpu.clock() - began)
        except Exception as error:  # a peer's failure is no failure of the engine; it is told
            words = [type(error).__name__, *str(error).splitlines()[:1]]
            missing[other.name] = ": ".join(words)[:200]
    return ready, missing


def _outputs(ours: Touchstone, other: Contestant) -> dict:
    """How what another chose in its timed calls compares with this engine's; for bench.json."""
    try:
        ids = other.token_ids()
    except PeerError as error:
        return {"outputs": f"not told: {error}"[:200]}
    shortfall = round(ours.shortfall(ids[0]), 4)
    return {
        "agreement": round(agreement(ids, ours.token_ids()), 3),
        "shortfall": shortfall,
        "outputs": "ok" if shortfall <= MAX_SHORTFALL else "differ",
    }


def _turn(others: dict[str, Interleaved], missing: dict[str, str]) -> None:
    """Everybody once; who fails in a process of its own is left out from then on."""
    for name, other in list(others.items()):
        try:
            other.turn()
        except PeerError as error:
            missing[name] = f"failed while it was timed: {error}"[:200]
            del others[name]


def _row(
    session: Session,
    point: Point,
    seconds: list[float],
    others: dict[str, Interleaved],
    ready: Iterable[Contestant],
) -> dict:
    """One point as bench.json has it; milliseconds per step."""
    steps = {other.name: getattr(other, "steps", point.steps) for other in ready}
    mine = Spread(tuple(1e3 * each / point.steps for each in seconds))
    spreads = {session.ours.name: mine}
    for name, other in others.items():
        (spread,) = other.spreads().values()
        per_call = steps.get(name, point.steps)
        spreads[name] = Spread(tuple(each / per_call for each in spread.rounds))
    floor = floor_ms(point, session.config, session.limits)
    return {
        "name": point.name,
        "kind": point.kind,
        "batch": point.batch,
        "context": point.context,
        "steps": point.steps,
        "target": point.target,
        "floor": round(floor, 5),
        "share_of_limit": round(floor / mine.median, 4),
        "noise": round(noise(mine, spreads[AGAIN]), 5),
        "contestants": {name: spread.to_json() for name, spread in spreads.items()},
    }
