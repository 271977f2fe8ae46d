"""What every compiled kernel keeps of PTX's memory model, read from its PTX; no GPU is needed.

A missing order may give the right bits for ever on one card, so each rule looks at all paths of a
kernel instead. Which address an instruction means it does not know, and what one thread
tells another by an mbarrier does not enter.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kernels.ptx_paths import Kernel, read_kernels, states

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++17", "-O3", "-arch=compute_90a", "-fmad=false", "-ptx")  # the Makefile's
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "kernels").glob("*.cu"))

REGISTER = re.compile(r"%(?:rs|rd|r|fd|f|p)\d+\b")
# Instructions whose first operand is no destination.
WRITE_NOTHING = re.compile(
    r"st\.|st\w*matrix|bra|bar|red\.|cp\.|fence|mbarrier\.(init|arrive)|wgmma\.[cfw]|ret|prefetch|"
    r"griddep|discard|setmax|nanosleep|trap"
)
MEETING = re.compile(r"bar\.warp\.sync|bar\.sync|barrier\.cluster\.wait")
ACQUIRE = re.compile(r"(ld|atom)\.acq")
NAMED_BARRIER = re.compile(r"bar\.(?:sync|arrive)\s+([^\s,]+)")
GLOBAL_WRITE = re.compile(r"(st|red|atom)\.([\w.]+\.)?global")
SHARED_ACCESS = re.compile(r"(ld|st)(\.volatile)?\.shared|ldmatrix")


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


class Products(NamedTuple):
    """Of a warpgroup's tensor cores: of the next group whether its registers are fenced and whether
    it has begun, and how many groups may be unfinished, 2 for more."""

    is_fenced: bool = False
    has_begun: bool = False
    pending: int = 0

    def after(self, code: str) -> "Products":
        """What holds after an instruction."""
        if code.startswith("wgmma.fence"):
            return self._replace(is_fenced=True)
        if code.startswith("wgmma.mma_async"):
            return self._replace(has_begun=True)
        if code.startswith("wgmma.commit_group"):
            return Products(pending=min(self.pending + 1, 2))
        if code.startswith("wgmma.wait_group"):
            return self._replace(pending=min(self.pending, int(code.split()[-1])))
        return self

    def either(self, other: "Products") -> "Products":
        """What may hold where two paths meet."""
        return Products(
            self.is_fenced and other.is_fenced,
            self.has_begun or other.has_begun,
            max(self.pending, other.pending),
        )


def products_of(kernel: Kernel) -> list[tuple[str, Products]]:
    """Every instruction that a thread may come to, with what may hold before it."""
    if not any(code.startswith("wgmma") for code in kernel.code):
        return []
    found = states(kernel, Products(), lambda code, at: at.after(code), Products.either)
    return [(code, at) for code, at in zip(kernel.code, found, strict=True) if at is not None]


def stages_released_while_read(kernel: Kernel) -> list[str]:
    """Arrivals at mbarriers while two groups of wgmma or more may be unfinished.

    A consumer's arrival says that something may be written again. Here it is what the newest group
    but one has read, or an older one, so only the newest may be under way.
    """
    return [
        code
        for code, at in products_of(kernel)
        if code.startswith("mbarrier.arrive.shared") and at.pending > 1
    ]


# They ask one question twice: a path that says yes and then no is taken by no thread. The first,
# whether there is a next tile, would end with a group under way; the second, which group of warps
# adds up the last sums, would write them without having waited.
ASKS_TWICE = ("attention_prefill_kernel", "batch_qkv_kernel")


def asks_twice(kernel: Kernel) -> bool:
    """Whether a kernel is one of those."""
    return any(name in kernel.name for name in ASKS_TWICE)


def products_out_of_turn(kernel: Kernel) -> list[str]:
    """Groups of wgmma without their fence, their commit, or anybody who waits for them.

    A group's registers were read since the one before: a wgmma.fence orders that. A wait is for
    what was committed. And a thread that ends beside its products never knew of their end.
    """
    return [
        code
        for code, at in products_of(kernel)
        if (code.startswith("wgmma.mma_async") and not at.is_fenced)
        or (code.startswith("wgmma.wait_group") and at.has_begun)
        or (code == "ret" and not asks_twice(kernel) and (at.has_begun or at.pending))
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


# What starts behind them reads, without waiting, what the kernel before them may still write.
START_OTHERS_LATE = ("batch_qkv_kernel", "batch_split_kernel")


def writes_ahead_of_the_kernel_before(kernel: Kernel) -> list[str]:
    """Writes to global memory by threads that have not waited for the kernel before, in a chain.

    That kernel may still read or write there. And where others rely on it, a thread lets the next
    kernel start only when it has waited itself.
    """
    is_chained = any(code.startswith("griddepcontrol") for code in kernel.code)
    has_waited = states(
        kernel,
        not is_chained,
        lambda code, has: has or code.startswith("griddepcontrol.wait"),
        lambda a, b: a and b,
    )
    is_late = any(name in kernel.name for name in START_OTHERS_LATE)
    return [
        code
        for code, has in zip(kernel.code, has_waited, strict=True)
        if has is False
        and (
            (GLOBAL_WRITE.match(code) and not asks_twice(kernel))
            or (code.startswith("griddepcontrol.launch") and is_late)
        )
    ]


RULES = (
    copies_before_a_proxy_fence,
    stages_released_while_read,
    products_out_of_turn,
    matrices_stored_without_meeting,
    values_that_nobody_wrote,
    writes_ahead_of_the_kernel_before,
)


def compiled(source: Path, folder: Path) -> list[Kernel]:
    """A source's kernels by nvcc; the test is left out where there is none."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:  # the twin alone is built there, and no kernel is there to be asked
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

# Small kernels: right ones, and of each the same with a fault that the rule of its name is for.
SMALL = """
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

enum Left { kNothing, kFence, kCommit, kWait, kEnd };
template <Left kOut>
static __device__ void multiply(float *out, int count) {
    __shared__ __align__(1024) char tiles[4096];
    __shared__ uint64_t empty;
    float sums[16] = {};
    for (int i = 0; i < count; ++i) {
        uint64_t tile = matrix_descriptor(shared_address(tiles));
        if (kOut != kFence) wgmma_fence();
        wgmma_k16(sums, tile, tile, 1);
        if (kOut != kCommit) wgmma_commit();
        if (kOut != kWait) wgmma_wait<1>();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&empty));
    }
    if (kOut != kEnd) wgmma_wait<0>();
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

template <bool kLetsFirst, bool kIsRight>
static __device__ void write_behind(float *out) {
    if (kLetsFirst) let_next_kernel_start();
    if (kIsRight || threadIdx.x < 32) wait_for_previous_kernel();
    out[threadIdx.x] = 1.0f;
}

extern "C" {
__global__ void copies_right(unsigned *c, const void *r) { meet_and_copy<true>(c, r); }
__global__ void copies_wrong(unsigned *c, const void *r) { meet_and_copy<false>(c, r); }
__global__ void stages_right(float *out, int count) { multiply<kNothing>(out, count); }
__global__ void stages_wrong(float *out, int count) { multiply<kWait>(out, count); }
__global__ void products_wrong_fence(float *out, int count) { multiply<kFence>(out, count); }
__global__ void products_wrong_commit(float *out, int count) { multiply<kCommit>(out, count); }
__global__ void products_wrong_end(float *out, int count) { multiply<kEnd>(out, count); }
__global__ void matrices_right(uint32_t *out, int count) { stage<true>(out, count); }
__global__ void matrices_wrong(uint32_t *out, int count) { stage<false>(out, count); }
__global__ void values_right(float *out) { add<true>(out); }
__global__ void values_wrong(float *out) { add<false>(out); }
__global__ void writes_right(float *out) { write_behind<true, true>(out); }
__global__ void writes_wrong(float *out) { write_behind<false, false>(out); }
__global__ void writes_wrong_batch_split_kernel(float *out) { write_behind<true, true>(out); }
}
"""


def test_each_rule_finds_its_own_fault_and_nothing_in_what_is_right(tmp_path: Path):
    source = tmp_path / "small.cu"
    source.write_text(SMALL)

    kernels = compiled(source, tmp_path)

    found = {kernel.name: [rule for rule in RULES if rule(kernel)] for kernel in kernels}
    meant = {rule.__name__.partition("_")[0]: rule for rule in RULES}
    wrong = {name for name in found if "_wrong" in name}
    assert {name.partition("_")[0] for name in wrong} == set(meant)
    for name, rules in found.items():
        assert rules == ([meant[name.partition("_")[0]]] if name in wrong else []), name


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
