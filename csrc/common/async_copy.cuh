// async_copy.cuh -- the instructions that copy while the program runs on, and the barriers that count what
// has come: PTX's, one function each.

#pragma once
#include <stdint.h>

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

// fence.proxy.async (PTX ISA 9.7.13.4): what this thread wrote to shared memory comes before what wgmma
// reads or a bulk copy writes there.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory: what this thread wrote there, or knows to be written, comes before bulk copies
// that read it.
__device__ __forceinline__ void fence_async_proxy_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
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

// mbarrier.arrive on a barrier of another block of the cluster, given its mapped address.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// st.async (PTX ISA 9.7.9.12): bytes into another block's shared memory, counted on its barrier there.
__device__ __forceinline__ void store_async_4(uint32_t to, float value, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
                 "f"(value), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void store_async_8(uint32_t to, float2 values, uint32_t barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
        "f"(values.x), "f"(values.y), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void store_async_16(uint32_t to, const float *values, uint32_t barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(to),
        "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(barrier)
        : "memory");
}
