"""Build the library once more, the CPU twin alone, with calls wrapped by the linker.

Used by tests that refuse what the library asks for, or look at what it leaves behind.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.source_stamp import source_stamp

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FAULTS = Path(__file__).parent / "faults"
FLAGS = (
    "-std=gnu11 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wno-psabi -pthread "
    "-DBUILT_WITH_CUDA=0"
).split()


def build_wrapped_twin(path: Path, wrapping: str | Sequence[str], wrapped: Sequence[str]) -> None:
    """Write the library to path.

    Args:
        path: the library, lib*.so.
        wrapping: the file or files in faults/ that define __wrap_x for each x in wrapped.
        wrapped: functions whose calls go there.
    """
    compiler = shutil.which("cc")
    if compiler is None:  # the library itself may have been built elsewhere
        pytest.skip("requires a C compiler")
    sources = [
        p for folder in ("twin", "model", "runtime") for p in sorted((CSRC / folder).glob("*.c"))
    ]
    wrapping = [wrapping] if isinstance(wrapping, str) else wrapping
    sources += [CSRC / "kernels" / "no_cuda.c", *(FAULTS / name for name in wrapping)]
    flags = [*FLAGS, f'-DSOURCE_STAMP="{source_stamp(CSRC)}"', "-shared"]
    wraps = [f"-Wl,--wrap={name}" for name in wrapped]
    subprocess.run([compiler, *flags, *wraps, "-o", path, *sources, "-lm"], check=True)
