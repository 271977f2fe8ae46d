"""The approximations that are only wanted rounded to bf16: every input is tried, on the card.

rounding.cu holds exp2 over all 2^32 float32, and silu over all 65536 gates, to the contract's. What
it counts is a proof, not a sample.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.ops import Ops

pytestmark = pytest.mark.gpu

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def found(gpu: Ops, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:
        pytest.skip("requires nvcc")
    program = str(tmp_path_factory.mktemp("rounding") / "rounding")
    flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-fmad=false"]
    subprocess.run([nvcc, *flags, "-o", program, str(HERE / "rounding.cu")], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def constant(name: str, header: str) -> int:
    return int(re.search(rf"\b{name} = (\d+);", (CSRC / header).read_text())[1])


def test_every_float32_has_the_contracts_exp2_rounded_or_is_near_a_tie(
    found: dict[str, dict[str, int]],
):
    assert found["exp2"]["wrong_unseen"] == 0
    assert found["exp2"]["unlike"] == 0


def test_the_bounds_of_exp2_are_the_largest_differences_there_are(
    found: dict[str, dict[str, int]],
):
    assert found["exp2"]["over"] == constant("kExp2Over", "common/exp2.cuh")
    assert found["exp2"]["under"] == constant("kExp2Under", "common/exp2.cuh")


def test_some_exp2_would_be_rounded_wrongly_if_none_were_watched(found: dict[str, dict[str, int]]):
    assert 0 < found["exp2"]["wrong"] <= found["exp2"]["near"]


def test_every_gate_has_the_contracts_silu_rounded(found: dict[str, dict[str, int]]):
    assert found["silu"]["wrong"] == 0
    assert found["silu"]["unlike"] == 0
    assert 0 < found["silu"]["over"] <= 3  # an approximation indeed
