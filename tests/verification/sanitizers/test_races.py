"""Kernels that hand values from warp to warp by barriers: racecheck finds nothing.

A barrier too few may give the right bits for ever on one card. Small cases with more than one round
of each kernel, since it is the next round that writes what the last may still read.
"""

import os
import subprocess
import sys

import pytest

from verification.sanitizers.__main__ import ROOT, tool
from verification.sanitizers.findings import read_report
from verification.sanitizers.lanes import BARRIERS

pytestmark = pytest.mark.gpu

LINEAR = """
from engine.bindings import Library
from engine.ops import Ops
from tests.kernels.inputs import normal
with Ops(Library(), "cuda") as ops:
    for tokens in (3, 16, 32):
        ops.linear(normal(1, tokens, 8192), normal(2, 64, 8192))
print("ran")
"""
ATTENTION = """
from engine.bindings import Library
from engine.ops import Ops
from tests.kernels.test_bits_attention import Scene
with Ops(Library(), "cuda") as ops:
    for group_size in (1, 4):
        Scene([(1029, 1), (2099, 1), (3, 1)], group_size, 16).run(ops)
print("ran")
"""
ROWS = """
import numpy as np
from engine.bindings import Library
from engine.ops import Ops
from tests.kernels.inputs import normal
with Ops(Library(), "cuda") as ops:
    ops.rms_norm(normal(1, 3, 2056), normal(2, 2056), 1e-5)
    ops.argmax(np.random.default_rng(1).standard_normal((3, 5000), dtype=np.float32))
print("ran")
"""
CODES = {"linear": LINEAR, "attention": ATTENTION, "rows": ROWS}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_racecheck_finds_nothing_where_rounds_share_memory(code: str):
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("requires compute-sanitizer of the CUDA toolkit")
    if not os.path.exists("/dev/nvidia0"):
        pytest.skip("requires a CUDA device of compute capability 9.0")
    racecheck = [sanitizer, "--tool", "racecheck", *BARRIERS, sys.executable, "-c", code]

    done = subprocess.run(racecheck, capture_output=True, text=True, cwd=ROOT, check=False)

    said = done.stdout + done.stderr
    assert "\nran\n" in f"\n{done.stdout}", said[-2000:]
    assert read_report(said).total == 0, said[-2000:]
