"""The engine with one barrier in another form, for a tool that cannot follow the first.

racecheck reports, now and then, accesses of decode_step_kernel that `bar.sync` of a part of its
threads orders; the same threads meeting at an mbarrier in the same places it follows. So what it
reports of that kernel is asked again of a library that differs in this form alone: a meeting that
is missing, or in the wrong place, is missing there too. What this cannot see is a wrong number or
a wrong count of threads in `bar.sync` itself: synccheck and the bits stand for those.

Knows the texts that it replaces and the Makefile; reads no report.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from verification.mutants.faults import Edit

KERNELS = ("decode_step_kernel",)  # those in which the form is another
PARTS = ("csrc", "engine", "build")
KEPT = shutil.ignore_patterns("planted", "sanitizers", "__pycache__", "*.json", "*.log", "*.xml")

# (command ...) -> what it prints
Output = Callable[..., str]

MEET = """
constexpr int kMeetings = 227 * 1024 - 64;  // mbarriers, in the last bytes of shared memory
__device__ __forceinline__ void meet(int meeting) {
    extern __shared__ unsigned char whole[];
    asm volatile(
        "{\\n"
        ".reg .b64 phase;\\n"
        ".reg .pred done;\\n"
        "mbarrier.arrive.shared::cta.b64 phase, [%0];\\n"
        "again:\\n"
        "mbarrier.try_wait.shared::cta.b64 done, [%0], phase;\\n"
        "@!done bra again;\\n"
        "}\\n" ::"r"(shared_address(whole + kMeetings) + 8 * meeting)
        : "memory");
}
"""
SIGNATURE = "__device__ __forceinline__ void consumer_barrier() {\n"
FENCE = "    if (thread < Shared::kTurns) barrier_init_fence();\n"
BYTES = "    const int kBytes = (int)sizeof(StepShared<kTokens, kCluster>);\n"
EDITS = (
    Edit(
        "csrc/kernels/decode_grid.cuh",
        SIGNATURE + "    named_barrier_sync<kConsumersMeet, kConsumers>();\n",
        MEET + SIGNATURE + "    meet(0);\n",
    ),
    Edit(
        "csrc/kernels/decode_attention.cuh",
        "    named_barrier_sync<kTileWarps * kWarp>(kTileWarpsMeet + place);\n",
        "    meet(1 + place);\n",
    ),
    Edit(
        "csrc/kernels/decode_step.cu",
        FENCE,
        "    if (thread <= kTilesAtOnce)\n"
        "        barrier_init(shared_address(raw + kMeetings) + 8 * thread,\n"
        "                     thread == 0 ? kConsumers : kTileWarps * kWarp);\n" + FENCE,
    ),
    Edit(
        "csrc/kernels/decode_step.cu",
        BYTES,
        "    const int kBytes = 227 * 1024;\n"
        "    using Shared = StepShared<kTokens, kCluster>;\n"
        "    static_assert(offsetof(Shared, is_last) + sizeof(int) <= kMeetings);\n",
    ),
)


def translate(root: Path, folder: Path, nvcc: str, output: Output) -> Path:
    """Builds the library of the translated sources in a copy of a built checkout.

    Args:
        root: the checkout, whose objects are taken over; not written to.
        folder: the copy; must not exist.
        nvcc: the compiler that make used.
        output: runs a command.

    Returns:
        The library; of a build that failed it is missing, or bears another stamp.

    Raises:
        CatalogueError: a text is not where it was.
    """
    for part in PARTS:
        shutil.copytree(root / part, folder / part, ignore=KEPT)
    shutil.copy2(root / "Makefile", folder)
    library = folder / "engine" / "libengine.so"
    library.unlink(missing_ok=True)
    for edit in EDITS:
        path = folder / edit.file
        path.write_text(edit.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
    # What an outer make exports must not reach this one.
    make = ("env", "-u", "MAKEFLAGS", "-u", "MFLAGS", "-u", "MAKELEVEL", "make", "--silent")
    output(*make, f"-j{os.cpu_count()}", "-C", str(folder), f"NVCC={nvcc}", "VENV=system", "build")
    return library
