"""Every vector width of the k16 step, built apart: they may differ in speed alone."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engine.ops import Ops
from tests.twin.bits import assert_same_bits
from tests.twin.test_tensor_core import adversarial

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "twin" / "tensor_core.c"
COMPILER = shutil.which("cc")
ROUTES = {  # macros that take the wider routes away
    "widest": (),
    "no AVX-512": ("-DNO_AVX512",),
    "portable": ("-DNO_AVX512", "-DNO_AVX2"),
}
ROWS, LANES, STEP = 11, 16, 16  # a block of eight rows, and a part of one


class Panel(ctypes.Structure):
    """As in tensor_core.h."""

    _fields_ = [("value", ctypes.c_float * 256), ("exponent", ctypes.c_int32 * 256)]


@pytest.fixture(scope="module", params=ROUTES)
def route(request, tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("route") / "tensor_core.so"
    flags = ["-std=gnu11", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra"]
    flags += ["-Werror", "-Wno-psabi", *ROUTES[request.param]]
    subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def rows_by(route: ctypes.CDLL, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One step of c [ROWS, LANES] with a [ROWS, STEP] and b [STEP, LANES] bf16 bits."""
    result = c.copy()
    value, exponent = np.empty(a.shape, np.float32), np.empty(a.shape, np.int32)
    route.tensor_core_decode(pointer(value), pointer(exponent), pointer(a), a.size)
    panel = Panel()
    route.tensor_core_decode_panel(ctypes.byref(panel), pointer(b), LANES, 1)
    route.tensor_core_step_rows(
        *(pointer(result), LANES, pointer(value), pointer(exponent), STEP, ROWS),
        ctypes.byref(panel),
    )
    return result


@pytest.mark.parametrize("seed", range(40))
def test_a_route_gives_the_specifications_bits(route: ctypes.CDLL, twin: Ops, seed: int):
    c, a, b = adversarial(seed, 7 * ROWS * LANES)
    at = np.random.default_rng(seed).permutation(len(c))  # regimes meet in one block
    c = np.ascontiguousarray(c[at][: ROWS * LANES].reshape(ROWS, LANES))
    a = np.ascontiguousarray(a[at][:ROWS])
    b = np.ascontiguousarray(b[at][:LANES].T)
    one_by_one = [np.repeat(a, LANES, 0), np.tile(b.T, (ROWS, 1))]
    expected = twin.tensor_core_step(c.ravel(), *map(np.ascontiguousarray, one_by_one))

    assert_same_bits(rows_by(route, c, a, b), expected.reshape(ROWS, LANES))


@pytest.mark.parametrize("low", [0x7F, 0x7E, 0x40, 0x01])
def test_the_largest_sums_are_cut_alike(route: ctypes.CDLL, twin: Ops, low: int):
    # sixteen products of one exponent and sign: sums of 28 to 31 bits, all cut to 24
    a = np.full((ROWS, STEP), 127 << 7 | low, np.uint16) - np.arange(ROWS, dtype=np.uint16)[:, None]
    b = np.full((STEP, LANES), 127 << 7 | 0x7F, np.uint16) - np.arange(LANES, dtype=np.uint16)
    c = np.linspace(-3, 3, ROWS * LANES, dtype=np.float32).reshape(ROWS, LANES)
    one_by_one = [np.repeat(a, LANES, 0), np.tile(b.T, (ROWS, 1))]
    expected = twin.tensor_core_step(c.ravel(), *map(np.ascontiguousarray, one_by_one))

    assert_same_bits(rows_by(route, c, a, b), expected.reshape(ROWS, LANES))
