"""Runs parts of the workload without a sanitizer and prints the kernels that they launched.

One name per line, as the driver's profiling interface tells them to torch; knows no library and no
verdict. `python -m verification.sanitizers.launches [PART ...]`
"""

import contextlib
import os
import sys
from collections.abc import Sequence

from torch.profiler import ProfilerActivity, profile

from verification.sanitizers.workload import PARTS, main


def launched(parts: Sequence[str]) -> set[str]:
    """Names of the kernels; a part at a time, as every launch is kept."""
    names: set[str] = set()
    for part in parts:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            profile(activities=[ProfilerActivity.CUDA]) as kept,
        ):
            main([part])
        names |= {event.key for event in kept.key_averages()}
    return names


if __name__ == "__main__":
    print("\n".join(sorted(launched(sys.argv[1:] or PARTS))))
