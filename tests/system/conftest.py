"""Runners on every device that is there; a test that needs a missing one is skipped, saying so."""

from collections.abc import Callable

import pytest

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
