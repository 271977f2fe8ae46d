// ptx.cuh -- the instructions C++ has no words for, one function each. Those of a warpgroup's tensor cores
// are in wgmma.cuh.

#pragma once
#include <stdint.h>

#include "async_copy.cuh"

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

// stmatrix (PTX ISA 9.7.14.5.16): four 8 x 8 tiles of bf16 to shared memory; lane i names row i % 8 of tile
// i / 8, lane (group, quad) gives columns 2 quad and 2 quad + 1 of row group of each tile.
__device__ __forceinline__ void store_matrix_x4(uint32_t row_address, uint32_t d0, uint32_t d1, uint32_t d2,
                                                uint32_t d3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
                 "r"(d0), "r"(d1), "r"(d2), "r"(d3)
                 : "memory");
}

// movmatrix (PTX ISA 9.7.14.5.17): an 8 x 8 tile of bf16 transposed; lane (group, quad) gives and receives
// columns 2 quad and 2 quad + 1 of row group.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t a) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// min, max (PTX ISA 9.7.3.11, 9.7.3.12): the smaller and the larger of two, NaN if either is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
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

// bar (PTX ISA 9.7.13.1): named barriers of part of a thread block; the last form does not wait.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void named_barrier_sync(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
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
__device__ __forceinline__ unsigned add_acquire_release(unsigned *counter, unsigned value) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(value)
                 : "memory");
    return before;
}
// discard (PTX ISA 9.7.9.16): 128 bytes that nobody will read again need not go from the L2 cache to memory.
__device__ __forceinline__ void discard_line(void *line) {
    asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned *counter) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
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

// griddepcontrol (PTX ISA 9.7.13.13): the next kernel of the stream may start; and the previous one has
// ended, its results visible.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
