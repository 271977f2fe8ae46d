"""The device side of the benchmarks: its clock, its limits, its clocks, what its kernels take.

Knows torch's view of the card and nvidia-smi; knows no engine.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.points import Limits

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GEMM_SIZE = 8192


def clock() -> float:
    """Seconds, once everything asked of the device is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def clocks() -> dict[str, str]:
    """The card's clocks, temperature and power at this moment."""
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(fields, (word.strip() for word in done.stdout.split(",")), strict=True))


def measure_limits() -> Limits:
    """Read bandwidth by bulk copies, and the rate of an 8192 cubed bf16 product through cuBLAS."""
    return Limits(_read_bandwidth(), _multiply_rate())


def _read_bandwidth() -> float:
    program = ROOT / "build" / "read_bandwidth"
    program.parent.mkdir(exist_ok=True)
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    flags = ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc' / 'common'}"]
    source = str(HERE / "read_bandwidth.cu")
    subprocess.run([nvcc, *flags, "-o", str(program), source], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _multiply_rate() -> float:
    make = lambda: torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    a, b, times = make(), make(), []
    for _ in range(12):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        torch.mm(a, b)
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) * 1e-3)
    return 2 * GEMM_SIZE**3 / float(np.median(times[2:]))


def kernel_times(call: Callable[[], object]) -> list[dict]:
    """Device time of every kernel of one call, longest first: name, count, microseconds."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    rows = [
        {"kernel": e.key, "count": e.count, "us": round(e.self_device_time_total, 1)}
        for e in profile.key_averages()
        if e.self_device_time_total
    ]
    return sorted(rows, key=lambda row: -row["us"])


def first_token_seconds(directory: Path, times: int = 3) -> dict[str, float]:
    """Medians over fresh processes: import, load, prefill, total."""
    runs = []
    for _ in range(times):
        command = [sys.executable, "-m", "tests.benchmarks.first_token", str(directory), "cuda"]
        done = subprocess.run(
            [*command, repr(time.time())], cwd=ROOT, capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout))
    return {key: round(float(np.median([run[key] for run in runs])), 3) for key in runs[0]}
