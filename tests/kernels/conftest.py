"""The GPU's operations, which every test of this folder holds against the twin's.

They skip, saying why, where there is no CUDA device; a skip is no pass.
"""

from collections.abc import Iterator

import pytest

from engine.bindings import Library
from engine.errors import DeviceUnavailable
from engine.ops import Ops


@pytest.fixture(scope="session")
def gpu(library: Library) -> Iterator[Ops]:
    try:
        ops = Ops(library, "cuda")
    except DeviceUnavailable as error:
        pytest.skip(f"requires a CUDA device of compute capability 9.0: {error}")
    with ops:
        yield ops
