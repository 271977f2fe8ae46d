"""What every compiled kernel keeps of PTX's memory model, read from its PTX; no GPU is needed.

A missing order may give the right bits for ever on one card, so each rule looks at all paths of a
kernel instead. It follows jumps, not values: which address an instruction means it does not know,
and what one thread tells another by an mbarrier does not enter.
"""

import os
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++17", "-O3", "-arch=compute_90a", "-fmad=false", "-ptx")  # the Makefile's
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "kernels").glob("*.cu"))

ENTRY = re.compile(r"(?:\.visible )?\.entry (\w+)\(")
GUARD = re.compile(r"@!?%?\w+\s+")
REGISTER = re.compile(r"%(?:rs|rd|r|fd|f|p)\d+\b")
# Instructions whose first operand is no destination.
WRITE_NOTHING = re.compile(
    r"st\.|st\w*matrix|bra|bar|red\.|cp\.|fence|mbarrier\.(init|arrive)|wgmma\.[cfw]|ret|prefetch|"
    r"griddep|discard|setmax|nanosleep|trap"
)
MEETING = re.compile(r"bar\.warp\.sync|bar\.sync|barrier\.cluster\.wait")
ACQUIRE = re.compile(r"(ld|atom)\.acq")
NAMED_BARRIER = re.compile(r"bar\.(?:sync|arrive)\s+([^\s,]+)")
SHARED_ACCESS = re.compile(r"(ld|st)(\.volatile)?\.shared|ldmatrix")


@dataclass
class Kernel:
    """The instructions of an entry, guards and labels taken off.

    Args:
        after: for each instruction those that may come next.
    """

    name: str
    code: list[str] = field(default_factory=list)
    after: list[list[int]] = field(default_factory=list)


def read_kernels(ptx: str) -> Iterator[Kernel]:
    """Every entry of a file; nvcc has inlined what it calls."""
    kernel, depth = None, 0
    for raw in ptx.splitlines():
        line = raw.partition("//")[0].strip()
        if entry := ENTRY.match(line):
            kernel, labels, jumps = Kernel(entry[1]), {}, {}
        elif kernel is None or not line or line[0] == ".":
            continue
        elif line in ("{", "}"):
            depth += 1 if line == "{" else -1
            if depth == 0:
                for place, label in jumps.items():
                    kernel.after[place].append(labels[label])
                yield kernel
                kernel = None
        elif depth and line[-1] == ":":
            labels[line[:-1]] = len(kernel.code)
        elif depth:
            _append(kernel, line.rstrip("; \t"), labels, jumps)


def _append(kernel: Kernel, line: str, labels: dict[str, int], jumps: dict[int, str]) -> None:
    guard = GUARD.match(line)
    code = line[guard.end() :] if guard else line
    assert not code.startswith(("call", "brx")), f"{kernel.name}: where does {code} go?"
    place = len(kernel.code)
    ends = re.match(r"(bra|ret|exit|trap)\b", code)
    after = [] if ends and not guard else [place + 1]
    if ends and ends[1] == "bra":
        label = code.split()[-1]
        if label.startswith("$"):
            jumps[place] = label
        else:  # of an asm statement: its name may come again, and it jumps back
            after.append(labels[label])
    kernel.code.append(code)
    kernel.after.append(after)


def states(kernel: Kernel, start: object, step: Callable, join: Callable) -> list:
    """What may hold before each instruction; None where none ever comes.

    Args:
        step: (instruction, what holds before it) -> what holds after it.
        join: of two paths that meet; it may only grow.
    """
    found = [None] * len(kernel.code)
    found[0], todo = start, deque([0])
    while todo:
        place = todo.popleft()
        out = step(kernel.code[place], found[place])
        for after in kernel.after[place]:
            joined = out if found[after] is None else join(found[after], out)
            if joined != found[after]:
                found[after] = joined
                todo.append(after)
    return found


def copies_before_a_proxy_fence(kernel: Kernel) -> list[str]:
    """Bulk copies from global memory between a meeting of thread blocks and a proxy fence.

    What other blocks wrote by ordinary stores the copy engine reads through another proxy: it need
    not see it unless a fence.proxy.async lies between (PTX ISA 8, causality order). A thread has
    met others where it acquires a counter, or at a barrier where one who has arrives.
    """
    known: set[str] = set()

    def step(code: str, has_met: bool) -> bool:
        if code.startswith("fence.proxy.async") and "shared" not in code:
            return False
        barrier = NAMED_BARRIER.match(code)
        learns = code.startswith("bar.sync") and barrier[1] in known
        return has_met or learns or bool(ACQUIRE.match(code))

    while True:
        met = states(kernel, False, step, lambda a, b: a or b)
        at = zip(kernel.code, met, strict=True)
        told = {found[1] for code, has in at if has and (found := NAMED_BARRIER.match(code))}
        if told <= known:
            break
        known |= told
    return [
        code
        for code, has in zip(kernel.code, met, strict=True)
        if has and code.startswith("cp.async.bulk") and "::cluster.global" in code
    ]


def stages_released_while_read(kernel: Kernel) -> list[str]:
    """Arrivals at mbarriers while two groups of wgmma or more may be unfinished.

    A consumer's arrival says that something may be written again. Here it is what the newest group
    but one has read, or an older one, so only the newest may be under way.
    """

    def step(code: str, pending: int) -> int:
        if code.startswith("wgmma.commit_group"):
            return min(pending + 1, 3)
        if code.startswith("wgmma.wait_group"):
            return min(pending, int(code.split()[-1]))
        return pending

    pending = states(kernel, 0, step, max)
    return [
        code
        for code, count in zip(kernel.code, pending, strict=True)
        if code.startswith("mbarrier.arrive.shared") and (count or 0) > 1
    ]


def matrices_stored_without_meeting(kernel: Kernel) -> list[str]:
    """Accesses of shared memory with a stmatrix before or after them, and no barrier between.

    A lane's row is written with other lanes' values, so a lane's own order says nothing: its warp
    must meet between reading a row and that instruction, and before anyone reads what it wrote.
    """

    def step(code: str, since: frozenset[str]) -> frozenset[str]:
        if MEETING.match(code):
            return frozenset()
        if code.startswith("stmatrix"):
            return since | {"stmatrix"}
        return since | {"other"} if SHARED_ACCESS.match(code) else since

    found = states(kernel, frozenset(), step, lambda a, b: a | b)
    return [
        code
        for code, since in zip(kernel.code, found, strict=True)
        if (code.startswith("stmatrix") and "other" in (since or ()))
        or (SHARED_ACCESS.match(code) and "stmatrix" in (since or ()))
    ]


def values_that_nobody_wrote(kernel: Kernel) -> list[str]:
    """Instructions that read a register which none writes.

    So nvcc leaves a variable without a value, and an array in registers read beyond its end: the
    result is undefined, whatever this compiler makes of it.
    """
    written = set()
    for code in kernel.code:
        if not WRITE_NOTHING.match(code):
            operands = code.partition(" ")[2] or code.partition("\t")[2]
            written |= set(REGISTER.findall(re.match(r"\s*({[^}]*}|[^,]*)", operands)[1]))
    return [code for code in kernel.code if set(REGISTER.findall(code)) - written]


RULES = (
    copies_before_a_proxy_fence,
    stages_released_while_read,
    matrices_stored_without_meeting,
    values_that_nobody_wrote,
)


def compiled(source: Path, folder: Path) -> list[Kernel]:
    """A source's kernels by nvcc; the test is left out where there is none."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:
        pytest.skip("requires nvcc")
    out = folder / "kernels.ptx"
    include = f"-I{ROOT / 'csrc' / 'common'}"
    subprocess.run([nvcc, *FLAGS, include, str(source), "-o", str(out)], check=True)
    return list(read_kernels(out.read_text(encoding="utf-8")))


@pytest.mark.parametrize("source", SOURCES)
def test_a_sources_kernels_keep_every_rule(source: str, tmp_path: Path):
    path = ROOT / "csrc" / "kernels" / f"{source}.cu"

    kernels = compiled(path, tmp_path)

    assert bool(kernels) == ("__global__" in path.read_text() or source in INSTANCES)
    broken = [f"{k.name}: {rule.__name__}: {c}" for k in kernels for rule in RULES for c in rule(k)]
    assert broken == []


# Their kernels are templates of headers.
INSTANCES = ("decode_batch_many", "gated_linear", "linear_add", "linear_many", "qkv_linear")

# Small kernels, the second of each pair with the fault that its rule is for.
PAIRS = """
#include "ptx.cuh"
#include "wgmma.cuh"

template <bool kIsRight>
static __device__ void meet_and_copy(unsigned *counter, const void *rows) {
    __shared__ uint64_t here;
    __shared__ __align__(16) char to[16];
    if (threadIdx.x == 32) {  // a warp of its own speaks for the block
        fence_gpu();
        add_relaxed(counter, 1);
        while (load_acquire(counter) < gridDim.x) {
        }
    }
    named_barrier_sync<5, 64>();
    if (kIsRight) fence_async_proxy_global();
    if (threadIdx.x == 0) copy_bulk(shared_address(to), rows, 16, shared_address(&here));
}

template <bool kIsRight>
static __device__ void multiply(float *out, int count) {
    __shared__ __align__(1024) char tiles[4096];
    __shared__ uint64_t empty;
    float sums[16] = {};
    for (int i = 0; i < count; ++i) {
        uint64_t tile = matrix_descriptor(shared_address(tiles));
        wgmma_fence();
        wgmma_k16(sums, tile, tile, 1);
        wgmma_commit();
        if (kIsRight) wgmma_wait<1>();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&empty));
    }
    wgmma_wait<0>();
    out[threadIdx.x] = sums[0];
}

template <bool kIsRight>
static __device__ void stage(uint32_t *out, int count) {
    __shared__ __align__(16) uint32_t rows[4 * 32];
    for (int i = 0; i < count; ++i) {
        store_matrix_x4(shared_address(rows + threadIdx.x % 32 * 4), i, i + 1, i + 2, i + 3);
        __syncwarp();
        out[i * 32 + threadIdx.x] = rows[threadIdx.x];
        if (kIsRight) __syncwarp();  // the rows are read before they are written again
    }
}

template <bool kIsRight>
static __device__ void add(float *out) {
    float values[4], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = out[i];
#pragma unroll
    for (int i = 0; i < (kIsRight ? 4 : 5); ++i) sum = __fmaf_rn(values[i], sum, 1.0f);
    out[threadIdx.x] = sum;
}

extern "C" {
__global__ void copies_right(unsigned *c, const void *r) { meet_and_copy<true>(c, r); }
__global__ void copies_wrong(unsigned *c, const void *r) { meet_and_copy<false>(c, r); }
__global__ void stages_right(float *out, int count) { multiply<true>(out, count); }
__global__ void stages_wrong(float *out, int count) { multiply<false>(out, count); }
__global__ void matrices_right(uint32_t *out, int count) { stage<true>(out, count); }
__global__ void matrices_wrong(uint32_t *out, int count) { stage<false>(out, count); }
__global__ void values_right(float *out) { add<true>(out); }
__global__ void values_wrong(float *out) { add<false>(out); }
}
"""


def test_each_rule_finds_its_own_fault_and_nothing_in_what_is_right(tmp_path: Path):
    source = tmp_path / "pairs.cu"
    source.write_text(PAIRS)

    kernels = compiled(source, tmp_path)

    found = {kernel.name: [rule for rule in RULES if rule(kernel)] for kernel in kernels}
    wrong = {f"{rule.__name__.partition('_')[0]}_wrong": [rule] for rule in RULES}
    right = {name.replace("wrong", "right"): [] for name in wrong}
    assert found == wrong | right


def test_jumps_are_followed_where_they_go():
    ptx = """
.visible .entry kernel(
    .param .u64 out
)
{
    .reg .b32 %r<3>;
    mov.u32 %r1, 0;
$L__BB0_1:
    // begin inline asm
    {
again:
    @!done bra again;
    }
    @%p1 bra $L__BB0_1;
    bra.uni $L__BB0_2;
$L__BB0_2:
    ret;
}
"""

    (kernel,) = read_kernels(ptx)

    assert kernel.code == [
        "mov.u32 %r1, 0",
        *["bra again", "bra $L__BB0_1"],
        "bra.uni $L__BB0_2",
        "ret",
    ]
    assert kernel.after == [[1], [2, 1], [3, 1], [4], []]
