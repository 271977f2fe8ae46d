"""Runners on every device that is there; a test that needs a missing one is skipped, saying so."""

from collections.abc import Callable, Iterator

import pytest

import engine.running_batch
from engine.errors import DeviceUnavailable
from engine.model_runner import ModelRunner

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def runner_of(
    request: pytest.FixtureRequest, make_runner: Callable[..., ModelRunner]
) -> Callable[..., ModelRunner]:
    """What `make_runner` makes, on one device after the other."""

    def make(name: str = "toy", **room: object) -> ModelRunner:
        try:
            return make_runner(name, **{"device": request.param, **room})
        except DeviceUnavailable as error:
            pytest.skip(f"requires a CUDA device of compute capability 9.0: {error}")

    return make


@pytest.fixture(scope="package", autouse=True)
def narrow_tables() -> Iterator[None]:
    """Block tables start with one column: so they widen and narrow in every schedule."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.running_batch, "FIRST_WIDTH", 1)
        yield
