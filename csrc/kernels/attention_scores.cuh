// attention_scores.cuh -- a warpgroup's scores of one tile to probabilities: docs/numerics.md section 4.
//
// 64 rows by 128 keys in wgmma's accumulators; the row sums' tree is that of attention.cuh's 16-row
// fragments. P is wanted rounded to bf16 alone, so the special function unit's exp2 serves wherever no
// value is near a tie: common/rounding.cuh.

#pragma once
#include "../common/rounding.cuh"
#include "attention.cuh"

constexpr int kWarpgroup = 128;
constexpr int kConsumerRows = 64;                                // rows of one wgmma
constexpr int kScores = kConsumerRows * kTileKeys / kWarpgroup;  // of a thread
constexpr int kOutputs = kConsumerRows * kHeadDim / kWarpgroup;
constexpr float kInfinity = __builtin_huge_valf();
constexpr int kWatchedFragments = 4;  // whose P is looked at, and computed again, together

// What a warp knows of its 16 rows of one tile: this lane's rows group and group + 8 (index `half`), of
// their outputs out[4 f + 2 half + column] is column 8 f + 2 quad + column.
struct TileSums {
    float max[2];
    float sum[2];
    float out[kOutputs];
};

// P of the keys of some fragments, from the first on, as the second product takes it.
static __device__ __forceinline__ void exponentiate(uint32_t (&weights)[kKeySteps][4],
                                                    const float (&scores)[kScores], const float (&max)[2],
                                                    float scale, int first) {
    TieWatch<kExp2Over, kExp2Under> watch;
#pragma unroll
    for (int f = first; f < first + kWatchedFragments; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float *score = &scores[4 * f + 2 * half];
            float low = approximate_exp2(__fmaf_rn(score[0], scale, -max[half]));
            float high = approximate_exp2(__fmaf_rn(score[1], scale, -max[half]));
            watch.see(low, high);
            weights[f / 2][f % 2 * 2 + half] = pack_bf16(low, high);
        }
    }
    if (!__any_sync(kFullWarp, watch.is_near_tie())) return;
#pragma unroll
    for (int f = first; f < first + kWatchedFragments; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float *score = &scores[4 * f + 2 * half];
            float low = contract_exp2(__fmaf_rn(score[0], scale, -max[half]));
            float high = contract_exp2(__fmaf_rn(score[1], scale, -max[half]));
            weights[f / 2][f % 2 * 2 + half] = pack_bf16(low, high);
        }
    }
}

// One tile's scores to its P, maximum and sum. Row `half` sees the first visible[half] keys; where that is
// none, the result is meaningless and must not be folded. `is_masked`: some row of the warp does not see
// all.
static __device__ __forceinline__ void soften(uint32_t (&weights)[kKeySteps][4], TileSums &tile,
                                              float (&scores)[kScores], const int (&visible)[2],
                                              bool is_masked, float scale, int lane) {
    if (is_masked) {  // exp2 of minus infinity is +0
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            int key = i / 4 * 8 + 2 * (lane % 4) + i % 2;
            if (key >= visible[i % 4 / 2]) scores[i] = -kInfinity;
        }
    }
    float largest[2] = {-kInfinity, -kInfinity};
#pragma unroll
    for (int i = 0; i < kScores; ++i) largest[i % 4 / 2] = fmaxf(largest[i % 4 / 2], scores[i]);
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) tile.max[half] = __fmul_rn(quad_max(largest[half]), scale);
#pragma unroll
    for (int f = 0; f < kKeyFragments; ++f) {
        if (f % kWatchedFragments == 0) exponentiate(weights, scores, tile.max, scale, f);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t pair = weights[f / 2][f % 2 * 2 + half];
            sum[half] = __fadd_rn(sum[half], __fadd_rn(low_float(pair), high_float(pair)));
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) tile.sum[half] = quad_sum(sum[half]);
}
