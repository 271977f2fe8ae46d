"""A device whose memory is not enough: refused in words, and the device serves what comes next."""

import pytest

from engine.bindings import Library
from engine.config import EngineConfig
from engine.errors import OutOfMemory
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits, normal

pytestmark = pytest.mark.gpu

# Of 64 KiB and more each: beyond the memory of any card there is.
TOO_MANY_BLOCKS = 1 << 23


def test_after_a_cache_too_large_for_the_device_the_next_launch_is_no_error(
    library: Library, gpu: Ops, twin: Ops
):
    room = EngineConfig(
        device="cuda",
        block_size=128,
        num_blocks=TOO_MANY_BLOCKS,
        max_seq_len=128,
        max_num_tokens=16,
        max_num_seqs=1,
    )

    with pytest.raises(OutOfMemory, match="device memory asked"):
        ModelRunner(resolve("toy"), room, library)

    x, y = normal(1, 100), normal(2, 100)
    assert_same_bits(gpu.residual_add(x, y), twin.residual_add(x, y))
