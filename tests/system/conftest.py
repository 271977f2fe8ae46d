"""Runners on every device that is there; a test that needs a missing one is skipped, saying so."""

from collections.abc import Callable, Iterator

import pytest

import engine.running_batch
from engine.model_runner import ModelRunner
from tests.devices import skipped_without_device

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def runner_of(
    request: pytest.FixtureRequest, make_runner: Callable[..., ModelRunner]
) -> Callable[..., ModelRunner]:
    """What `make_runner` makes, on one device after the other."""

    def make(name: str = "toy", **room: object) -> ModelRunner:
        with skipped_without_device():
            return make_runner(name, **{"device": request.param, **room})

    return make


@pytest.fixture(scope="package", autouse=True)
def narrow_tables() -> Iterator[None]:
    """Block tables start with one column: so they widen and narrow in every schedule."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.running_batch, "FIRST_WIDTH", 1)
        yield
