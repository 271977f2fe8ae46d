// reduce.cuh -- sums in the order the contract fixes, whatever the launch shape.

#pragma once
#include "numerics.h"
#include "vector.cuh"

// The xor tree of docs/numerics.md section 5 inside a warp; every lane ends with the same bits, because
// each addition of two lanes is the same addition.
__device__ __forceinline__ float warp_tree_sum(float value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        value = __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, offset));
    }
    return value;
}

// The whole tree over NUMERICS_NORM_LANES threads of a thread block; every thread gets the sum.
// `warp_sums` is shared memory of NUMERICS_NORM_LANES / 32 floats.
__device__ __forceinline__ float block_tree_sum(float value, float *warp_sums) {
    constexpr int kGroups = NUMERICS_NORM_LANES / kWarp;
    value = warp_tree_sum(value);
    if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
    __syncthreads();  // the sums of all groups visible to every thread
    float sum = warp_sums[threadIdx.x % kGroups];
#pragma unroll
    for (int offset = kGroups / 2; offset > 0; offset /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, offset));
    }
    return sum;
}
