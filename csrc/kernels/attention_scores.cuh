// attention_scores.cuh -- a warpgroup's scores of one tile to probabilities: docs/numerics.md section 4.
//
// 64 rows by 128 keys in wgmma's accumulators; the row sums' tree is that of attention.cuh's 16-row
// fragments.

#pragma once
#include "attention.cuh"

constexpr int kWarpgroup = 128;
constexpr int kConsumerRows = 64;                                // rows of one wgmma
constexpr int kScores = kConsumerRows * kTileKeys / kWarpgroup;  // of a thread
constexpr int kOutputs = kConsumerRows * kHeadDim / kWarpgroup;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kSmallestExponent = -126.0f;  // below it the contract's exp2 is zero

// What a warp knows of its 16 rows of one tile: this lane's rows group and group + 8 (index `half`), of
// their outputs out[4 f + 2 half + column] is column 8 f + 2 quad + column.
struct TileSums {
    float max[2];
    float sum[2];
    float out[kOutputs];
};

// The smaller of two, NaN if either is.
static __device__ __forceinline__ float min_or_nan(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

// contract_exp2 of an x known to be in [-126, 1): no case is special.
static __device__ __forceinline__ float exp2_in_range(float x) {
    const float kRoundToInteger = 12582912.0f;
    float shifted = __fadd_rn(x, kRoundToInteger);
    float f = __fsub_rn(x, __fsub_rn(shifted, kRoundToInteger));
    float p = __int_as_float(EXP2_C6);
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C5));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C4));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C3));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C2));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C1));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C0));
    return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

// What a warp's scores of a tile ask for. Ranged: every exponent is one that exp2_in_range takes, but for
// those of masked keys. Masked: some row does not see every key.
enum ScoreKind { kRanged, kRangedMasked, kAny };

// P of one tile as the second product takes it, and its row sums.
template <ScoreKind kKind>
static __device__ __forceinline__ void exponentiate(uint32_t (&weights)[kKeySteps][4], TileSums &tile,
                                                    const float (&scores)[kScores], const int (&visible)[2],
                                                    float scale, int lane) {
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int f = 0; f < kKeyFragments; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float p[2];
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                float x = __fmaf_rn(scores[4 * f + 2 * half + column], scale, -tile.max[half]);
                p[column] = kKind == kAny ? contract_exp2(x) : exp2_in_range(x);
                if (kKind != kRanged && f * 8 + 2 * (lane % 4) + column >= visible[half]) p[column] = 0.0f;
            }
            uint32_t pair = pack_bf16(p[0], p[1]);
            weights[f / 2][f % 2 * 2 + half] = pair;
            sum[half] = __fadd_rn(sum[half], __fadd_rn(low_float(pair), high_float(pair)));
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) tile.sum[half] = quad_sum(sum[half]);
}

// One tile's scores to its P, maximum and sum. Row `half` sees the first visible[half] keys; where that is
// none, the result is meaningless and must not be folded. `is_masked`: some row of the warp does not see
// all.
static __device__ __forceinline__ void soften(uint32_t (&weights)[kKeySteps][4], TileSums &tile,
                                              const float (&scores)[kScores], const int (&visible)[2],
                                              bool is_masked, float scale, int lane) {
    float largest[2] = {-kInfinity, -kInfinity}, smallest[2] = {kInfinity, kInfinity};
    bool is_in_range = true;
    if (is_masked) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            int half = i % 4 / 2, key = i / 4 * 8 + 2 * (lane % 4) + i % 2;
            if (key >= visible[half]) continue;
            largest[half] = fmaxf(largest[half], scores[i]);
            smallest[half] = min_or_nan(smallest[half], scores[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            int half = i % 4 / 2;
            largest[half] = fmaxf(largest[half], scores[i]);
            smallest[half] = min_or_nan(smallest[half], scores[i]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        tile.max[half] = __fmul_rn(quad_max(largest[half]), scale);
        is_in_range &= __fmaf_rn(smallest[half], scale, -tile.max[half]) >= kSmallestExponent;
    }
    if (!__all_sync(kFullWarp, is_in_range)) {  // keys of very different size, or not finite
        exponentiate<kAny>(weights, tile, scores, visible, scale, lane);
    } else if (is_masked) {
        exponentiate<kRangedMasked>(weights, tile, scores, visible, scale, lane);
    } else {
        exponentiate<kRanged>(weights, tile, scores, visible, scale, lane);
    }
}
