import pytest

from engine.errors import DeviceUnavailable, EngineError
from tests.devices import skipped_without_device


def test_where_there_is_no_device_a_test_is_skipped_with_the_reason():
    with (
        pytest.raises(pytest.skip.Exception, match="requires a CUDA device.*no driver"),
        skipped_without_device(),
    ):
        raise DeviceUnavailable("no driver")


def test_any_other_failure_stays_one():
    with pytest.raises(EngineError, match="illegal address"), skipped_without_device():
        raise EngineError("illegal address")
