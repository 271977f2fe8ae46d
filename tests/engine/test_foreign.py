import subprocess
from pathlib import Path

import numpy as np
import pytest

from engine.errors import EngineError
from engine.foreign import POISONS, ForeignLibrary, ForeignOps

SOURCE = """
#include <stdint.h>
int op_residual_add(void *c, uint16_t *out, const uint16_t *x, const uint16_t *y, int64_t n) {
    if (c) return 9;
    for (int64_t i = 0; i < n; i++) out[i] = y[i];
    if (x[0] == 1) out[-1] = 0;
    if (x[0] == 2) out[n] = 0;
    if (x[0] == 3) ((uint16_t *)x)[0] = 0;
    if (x[0] == 4) out[0] = x[n];
    return x[0] == 5 ? 4 : 0;
}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "mine.c").write_text(SOURCE)
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "mine.so"), str(folder / "mine.c")]
    subprocess.run(command, check=True)
    return folder / "mine.so"


def add(path: Path, first: int, poison: str = "NaN") -> tuple[np.ndarray, list[str]]:
    library = ForeignLibrary(path)
    library.poison = POISONS[poison]
    ops = ForeignOps(library)
    x, y = np.full(7, first, np.uint16), np.arange(7, dtype=np.uint16)
    return ops.residual_add(x, y), ops.complaints


def test_a_clean_call_gives_its_result_and_no_complaint(path):
    out, complaints = add(path, 0)

    assert (out == np.arange(7)).all()
    assert complaints == []


@pytest.mark.parametrize(
    ("first", "complaint"),
    [(1, "it wrote before out"), (2, "it wrote after out"), (3, "it changed its input x")],
)
def test_harm_to_memory_is_seen(path, first, complaint):
    assert add(path, first)[1] == [complaint]


@pytest.mark.parametrize("poison", POISONS)
def test_what_lies_beside_an_input_is_the_poison(path, poison):
    assert add(path, 4, poison)[0][0] == POISONS[poison]


def test_a_failed_status_is_an_error_and_the_next_call_is_clean(path):
    ops = ForeignOps(ForeignLibrary(path))
    bad, good = np.full(3, 5, np.uint16), np.zeros(3, np.uint16)

    with pytest.raises(EngineError, match="it returned status 4"):
        ops.residual_add(bad, good)

    assert (ops.residual_add(good, bad) == bad).all()
    assert ops.complaints == []


def test_a_missing_function_and_a_missing_file_are_named(path):
    with pytest.raises(EngineError, match=r"mine\.so does not export op_exp2"):
        ForeignOps(ForeignLibrary(path)).exp2(np.zeros(3, np.float32))
    with pytest.raises(EngineError, match="no such file"):
        ForeignLibrary(path.parent / "none.so")


def test_an_object_with_contexts_is_given_one(library):
    ops = ForeignOps(ForeignLibrary(library.path))
    x = np.full(5, 0x3F80, np.uint16)  # 1.0

    assert (ops.residual_add(x, x) == 0x4000).all()
    with pytest.raises(EngineError, match="in_features"):
        ops.linear(np.zeros((1, 3), np.uint16), np.zeros((2, 3), np.uint16))
    ops.close()
