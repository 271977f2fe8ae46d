"""The GPU's operations, which every test of this folder holds against the twin's.

They skip, saying why, where there is no CUDA device; a skip is no pass.
"""

from collections.abc import Iterator

import pytest

from engine.bindings import Library
from engine.ops import Ops
from tests.devices import skipped_without_device


@pytest.fixture(scope="session")
def gpu(library: Library) -> Iterator[Ops]:
    with skipped_without_device():
        ops = Ops(library, "cuda")
    with ops:
        yield ops
