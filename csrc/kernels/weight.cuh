// weight.cuh -- a token's probability as an integer, the same bits as twin/weight.h; and exact sums of
// such integers over a thread block.
//
// Source    docs/numerics.md section 8

#pragma once
#include <stdint.h>
#include "../common/exp2.cuh"
#include "../common/vector.cuh"

// p relative to the most likely token's: exp2((logit - largest) * scale).
static __device__ __forceinline__ float relative_probability(float logit, float largest, float scale) {
    return contract_exp2(__fmul_rn(__fsub_rn(logit, largest), scale));
}

// In units of 2^-38, cut: the product is exact.
static __device__ __forceinline__ uint64_t weight_of(float probability) {
    constexpr float kUnit = (float)(1ull << NUMERICS_WEIGHT_BITS);
    return __float2ull_rz(__fmul_rn(probability, kUnit));
}

static __device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(kFullWarp, value, offset);
    return value;
}

// Every thread gets the sum over the thread block; `warp_sums` is shared memory of kWarps values.
template <int kWarps>
static __device__ __forceinline__ uint64_t block_sum(uint64_t value, uint64_t *warp_sums) {
    value = warp_sum(value);
    __syncthreads();  // the last use of warp_sums is over
    if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
    __syncthreads();  // every warp's sum visible
    uint64_t sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) sum += warp_sums[warp];
    return sum;
}
