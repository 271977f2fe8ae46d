"""The library, its CPU operations and loaded models for every folder; one seed for Hypothesis.

At the end of a run it says what was left out.
"""

import os
from collections.abc import Callable, Iterator

# Before torch is imported: its waiting threads would take the cores from the engine's. A toy's
# verification takes 0.4 s so, and took 6 to 28 s on two busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, Phase, settings

from engine.bindings import Library
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops
from tests.left_out import left_out

settings.register_profile(
    "touchstone",
    derandomize=True,  # the same examples on every machine and in every run
    database=None,
    deadline=None,  # tests never time
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# To find a planted fault is enough: shrinking takes the most time.
settings.register_profile(
    "mutants", settings.get_profile("touchstone"), phases=(Phase.explicit, Phase.generate)
)
# Other examples each time: what was not tried before.
settings.register_profile("deep", settings.get_profile("touchstone"), derandomize=False)
settings.load_profile("touchstone")


@pytest.fixture(scope="session")
def library() -> Library:
    return Library()


@pytest.fixture(scope="session")
def twin(library: Library) -> Iterator[Ops]:
    with Ops(library, "cpu") as ops:
        yield ops


@pytest.fixture(scope="session")
def make_runner(library: Library) -> Iterator[Callable[..., ModelRunner]]:
    """Runners of named models; one with the same room is made once and shared.

    Keyword arguments are EngineConfig's; the defaults leave room for every test that does not ask
    for a limit.
    """
    runners: dict[tuple[object, ...], ModelRunner] = {}

    def make(name: str = "toy", **room: object) -> ModelRunner:
        room = {
            "device": "cpu",
            "num_blocks": 40,
            "block_size": 16,
            "max_seq_len": 512,
            "max_num_tokens": 512,
            "max_num_seqs": 8,
        } | room
        key = (name, *sorted(room.items()))
        if key not in runners:
            runners[key] = ModelRunner(resolve(name), EngineConfig(**room), library)
        return runners[key]

    yield make
    for runner in runners.values():
        runner.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", ())
    lines = left_out(report.longrepr[2] for report in skipped)
    if lines:
        terminalreporter.section("left out, and why")
        terminalreporter.write_line("\n".join(lines))
