"""What a test on a device does where there is none: one place, so that nothing else is skipped."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine.errors import DeviceUnavailable


@contextmanager
def skipped_without_device() -> Iterator[None]:
    """Around the opening of a device alone: a device lost later is a failure, not a skip."""
    try:
        yield
    except DeviceUnavailable as error:
        pytest.skip(f"requires a CUDA device of compute capability 9.0: {error}")
