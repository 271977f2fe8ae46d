"""The operations in Python: what is refused before C sees it, and that inputs stay as they were."""

import numpy as np
import pytest

from engine.bindings import Library
from engine.errors import DeviceUnavailable, InvalidArgument
from engine.ops import Ops
from tests.twin.bits import normal


def test_closed_operations_refuse_every_call(library: Library):
    ops = Ops(library, "cpu", 1)
    ops.close()
    ops.close()

    with pytest.raises(InvalidArgument, match="closed"):
        ops.residual_add(normal(1, 4), normal(2, 4))


@pytest.mark.parametrize("num_threads", [-1, 1025])
def test_an_impossible_number_of_threads_is_refused(library: Library, num_threads: int):
    with pytest.raises(InvalidArgument, match=f"num_threads is {num_threads}, must be 0 .. 1024"):
        Ops(library, "cpu", num_threads)


def test_a_library_without_cuda_says_so(library: Library):
    if library.has_cuda:
        pytest.skip("requires a library that was built without CUDA")

    with pytest.raises(DeviceUnavailable, match="CUDA"):
        Ops(library, "cuda")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops: ops.rms_norm(normal(1, 2, 64), normal(2, 63), 1e-5), "weight"),
        (lambda ops: ops.linear(normal(1, 2, 64), normal(2, 3, 48)), "weight"),
        (lambda ops: ops.linear_f32(normal(1, 2, 64), normal(2, 3, 128)), "weight"),
        (lambda ops: ops.silu_and_mul(normal(1, 2, 64), normal(2, 2, 65)), "up"),
        (lambda ops: ops.residual_add(normal(1, 64), normal(2, 65)), "y"),
        (
            lambda ops: ops.tensor_core_step(
                np.zeros(2, np.float32), normal(1, 2, 15), normal(2, 2, 16)
            ),
            "a",
        ),
        (
            lambda ops: ops.tensor_core_step(
                np.zeros(2, np.float32), normal(1, 2, 16), normal(2, 3, 16)
            ),
            "b",
        ),
        (
            lambda ops: ops.rotary_embedding(
                normal(1, 2, 1, 64), normal(2, 9, 64), np.zeros(3, np.int32)
            ),
            "positions",
        ),
        (
            lambda ops: ops.rotary_embedding(
                normal(1, 2, 1, 64), normal(2, 9, 32), np.zeros(2, np.int32)
            ),
            "table",
        ),
    ],
)
def test_shapes_that_disagree_are_refused_by_name(twin: Ops, call, message: str):
    with pytest.raises(InvalidArgument, match=rf"^{message}: dimensions .*, must be "):
        call(twin)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops: ops.residual_add(np.zeros(4, np.float32), np.zeros(4, np.float32)), "uint16"),
        (lambda ops: ops.exp2(np.zeros(4)), "float32"),
        (lambda ops: ops.argmax(np.zeros((1, 4))), "logits must be a contiguous float32"),
        (
            lambda ops: ops.embedding(normal(1, 4, 64), np.zeros(2, np.int64)),
            "ids must be a contiguous int32",
        ),
        (
            lambda ops: ops.linear(normal(1, 4, 32)[:, ::2], normal(2, 4, 16)),
            "x must be .*not contiguous",
        ),
    ],
)
def test_other_dtypes_and_strides_are_refused(twin: Ops, call, message: str):
    with pytest.raises(InvalidArgument, match=message):
        call(twin)


def test_inputs_are_not_changed(twin: Ops):
    x, y = normal(1, 5, 64), normal(2, 5, 64)
    x_before, y_before = x.copy(), y.copy()

    twin.residual_add(x, y)
    twin.silu_and_mul(x, y)
    twin.linear(x, y)
    twin.rms_norm(x, y[0].copy(), 1e-5)

    assert (x == x_before).all() and (y == y_before).all()


def test_results_are_arrays_of_their_own(twin: Ops):
    x = normal(1, 64)

    first = twin.residual_add(x, x)
    kept = first.copy()
    twin.residual_add(first, first)

    assert (first == kept).all()
