// ptx.cuh -- the instructions C++ has no words for, one function each.

#pragma once
#include <stdint.h>

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

// mma.sync.m16n8k16 (PTX ISA 9.7.14, warp-level matrix instructions): d = step(d, a, b), a 16 x 8 tile of
// outputs per warp. With group = lane / 4 and quad = lane % 4, this lane holds of
//   a  rows group, group + 8, group, group + 8 at k 2 quad, 2 quad + 1 (first two), + 8 (last two)
//   b  column group at k 2 quad, 2 quad + 1 (first), + 8 (second)
//   d  row group at columns 2 quad, 2 quad + 1 (first two), row group + 8 (last two)
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ldmatrix (PTX ISA 9.7.14.5.15): four 8 x 8 tiles of bf16; lane i names row i % 8 of tile i / 8. Lane
// (group, quad) receives columns 2 quad and 2 quad + 1 of row group of each tile.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&d)[4], uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(row_address)
                 : "memory");
}

// The same, each tile transposed on the way.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&d)[4], uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(row_address)
                 : "memory");
}

// movmatrix (PTX ISA 9.7.14.5.17): an 8 x 8 tile of bf16 transposed; lane (group, quad) gives and receives
// columns 2 quad and 2 quad + 1 of row group.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t a) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// min (PTX ISA 9.7.3.11): the smaller of two, NaN if either is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

// cp.async (PTX ISA 9.7.9.25.3): 16 bytes from global to shared memory, past the L1 cache. Of the source
// only the first source_bytes are read, the rest becomes zero.
__device__ __forceinline__ void copy_async_16(uint32_t to_shared, const void *from, int source_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from),
                 "r"(source_bytes)
                 : "memory");
}

// Close this thread's current group of asynchronous copies.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most kPending of this thread's groups are unfinished.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// mbarrier (PTX ISA 9.7.13.15): a phase ends when the expected arrivals and bytes are in.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for `bytes` of bulk copies too.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Waits for the end of the phase of this parity; phases count from 0.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Waits likewise for arrivals from other blocks of the cluster: what they did before is over.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Whether it has ended.
__device__ __forceinline__ bool barrier_is_over(uint32_t barrier, int parity) {
    int is_over;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(is_over)
        : "r"(barrier), "r"(parity)
        : "memory");
    return is_over;
}

// cp.async.bulk (PTX ISA 9.7.9.25.4): contiguous bytes, a multiple of 16, from global to shared memory;
// arrival is counted on the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t to_shared, const void *from, int bytes,
                                          uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            to_shared),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// The same with a cache policy.
__device__ __forceinline__ void copy_bulk_with_policy(uint32_t to_shared, const void *from, int bytes,
                                                      uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
        "[%3], "
        "%4;" ::"r"(to_shared),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// createpolicy (PTX ISA 9.7.9.18): lines of this access are the first to leave the L2 cache.
__device__ __forceinline__ uint64_t evict_first_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// bar (PTX ISA 9.7.13.1): named barriers of part of a thread block; the second form does not wait.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}
template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier_arrive() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// Counters in global memory that thread blocks meet at (PTX ISA 8, memory consistency model). The fence is
// what a release or an acquire needs; __threadfence() would be the slower, sequentially consistent one.
__device__ __forceinline__ void fence_gpu() {
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
}
__device__ __forceinline__ void add_relaxed(unsigned *counter, unsigned value) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned *counter) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// fence.proxy.async (PTX ISA 9.7.13.4): what this thread wrote to shared memory comes before what wgmma
// reads or a bulk copy writes there.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// setmaxnreg (PTX ISA 9.7.19.5): a warpgroup gives registers back, or waits until it may have more.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// stmatrix (PTX ISA 9.7.14.5.16): four 8 x 8 tiles of bf16 to shared memory; lane i names row i % 8 of tile
// i / 8, lane (group, quad) gives columns 2 quad and 2 quad + 1 of row group of each tile.
__device__ __forceinline__ void store_matrix_x4(uint32_t row_address, uint32_t d0, uint32_t d1, uint32_t d2,
                                                uint32_t d3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
                 "r"(d0), "r"(d1), "r"(d2), "r"(d3)
                 : "memory");
}

// barrier.cluster (PTX ISA 9.7.13.3): what the cluster's threads wrote before arriving is visible after
// waiting.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// mapa (PTX ISA 9.7.9.24): the address of the same place in the shared memory of block `rank` of the
// cluster.
__device__ __forceinline__ uint32_t map_shared(uint32_t address, int rank) {
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// mbarrier.arrive (PTX ISA 9.7.13.15.13) at another block's barrier, named by map_shared.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// st.async (PTX ISA 9.7.9.12): 16 bytes into another block's shared memory, counted on its barrier there.
__device__ __forceinline__ void store_async_16(uint32_t to, const float *values, uint32_t barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(to),
        "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(barrier)
        : "memory");
}

// 16 bytes of this block's shared memory, which another block's st.async wrote.
__device__ __forceinline__ float4 load_shared_16(uint32_t from) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_shared_16(uint32_t to, const float *values) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(values[0]), "f"(values[1]),
                 "f"(values[2]), "f"(values[3])
                 : "memory");
}

__device__ __forceinline__ void store_shared_zero_16(uint32_t to) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// griddepcontrol (PTX ISA 9.7.13.13): the next kernel of the stream may start; and the previous one has
// ended, its results visible.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ex2.approx, rcp.approx (PTX ISA 9.7.3.21, 9.7.3.14): the special function unit's, some ULPs off; what
// would be denormal is zero.
__device__ __forceinline__ float approximate_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
__device__ __forceinline__ float approximate_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
