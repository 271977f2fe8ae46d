// attention_fold.cuh -- a warpgroup's tiles folded into segments, segments into the row: docs/numerics.md
// section 4. What is folded lies in shared memory: three warpgroups leave no registers for it.

#pragma once
#include "attention_scores.cuh"

constexpr int kFoldedBytes = kConsumerRows * kHeadDim * (int)sizeof(float);  // a warpgroup's outputs

// What TileSums says of one tile, of some tiles folded; the outputs are in shared memory, in columns of 16
// bytes per thread.
struct FoldedSums {
    uint32_t at;
    float max[2];
    float sum[2];

    __device__ __forceinline__ float4 load(int f) const {
        return load_shared_16(at + f * kWarpgroup * (int)sizeof(float4));
    }
    __device__ __forceinline__ void store(int f, const float4 &values) const {
        store_shared_16(at + f * kWarpgroup * (int)sizeof(float4), &values.x);
    }
};

// One of a fold's two factors is exp2(0) = 1; the other depends on the difference alone.
static __device__ __forceinline__ FoldFactors fold_row(float &max, float &sum, float new_max,
                                                       float new_sum) {
    float difference = __fsub_rn(max, new_max);
    float shrink = contract_exp2(-fabsf(difference));
    FoldFactors factors = {difference >= 0.0f ? 1.0f : shrink, difference >= 0.0f ? shrink : 1.0f};
    max = fmaxf(max, new_max);
    sum = __fmaf_rn(new_sum, factors.take, __fmul_rn(sum, factors.keep));
    return factors;
}

// Folds the outputs next_out(f) into `state` for the rows that take part. Without branches that part a
// warp: the tensor cores are at work on the next tile.
template <bool kAll, typename NextOut>
static __device__ __forceinline__ void fold_outputs(const FoldedSums &state, const FoldFactors &low,
                                                    const FoldFactors &high, const bool (&takes_part)[2],
                                                    NextOut next_out) {
#pragma unroll
    for (int f = 0; f < kDimFragments; ++f) {
        float4 old = state.load(f), next = next_out(f), folded;
        folded.x = fold_value(old.x, next.x, low);
        folded.y = fold_value(old.y, next.y, low);
        folded.z = fold_value(old.z, next.z, high);
        folded.w = fold_value(old.w, next.w, high);
        if constexpr (!kAll) {
            folded.x = takes_part[0] ? folded.x : old.x;
            folded.y = takes_part[0] ? folded.y : old.y;
            folded.z = takes_part[1] ? folded.z : old.z;
            folded.w = takes_part[1] ? folded.w : old.w;
        }
        state.store(f, folded);
    }
}

// A row's first contribution is taken as it is.
template <typename NextOut>
static __device__ __forceinline__ void fold_rows(FoldedSums &state, const float (&next_max)[2],
                                                 const float (&next_sum)[2], bool is_first,
                                                 const bool (&takes_part)[2], NextOut next_out) {
    if (is_first) {
#pragma unroll
        for (int f = 0; f < kDimFragments; ++f) state.store(f, next_out(f));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            state.max[half] = next_max[half];
            state.sum[half] = next_sum[half];
        }
        return;
    }
    FoldFactors factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float max = state.max[half], sum = state.sum[half];
        factors[half] = fold_row(max, sum, next_max[half], next_sum[half]);
        state.max[half] = takes_part[half] ? max : state.max[half];
        state.sum[half] = takes_part[half] ? sum : state.sum[half];
    }
    if (__all_sync(kFullWarp, takes_part[0] && takes_part[1])) {
        fold_outputs<true>(state, factors[0], factors[1], takes_part, next_out);
    } else {
        fold_outputs<false>(state, factors[0], factors[1], takes_part, next_out);
    }
}
