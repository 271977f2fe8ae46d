// attention_scores.cuh -- a warpgroup's scores of one tile to probabilities: docs/numerics.md section 4.
//
// 64 rows by 128 keys in wgmma's accumulators; the row sums' tree is that of attention.cuh's 16-row
// fragments. P is wanted rounded to bf16 alone, so the special function unit's exp2 serves wherever no
// value is near a tie: common/rounding.cuh.

#pragma once
#include <limits.h>

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

// A float's bits. An instruction of its own: where the compiler is free to choose, it reads the tensor
// cores' results as integers while they are still being written, and has to wait for them there.
static __device__ __forceinline__ int bits_of(float value) {
    int bits;
    asm("mov.b32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

// The largest score of each half's row, the same for a quad's lanes. As integers, of which one instruction
// compares three: in their order a positive number is the larger of any two, so only rows without one, which
// are rare, are compared again as numbers.
static __device__ __forceinline__ void find_largest(float (&largest)[2], const float (&scores)[kScores]) {
    int chains[4] = {INT_MIN, INT_MIN, INT_MIN, INT_MIN}, bits[2];  // two of each half, side by side
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
        int &chain = chains[i / 2 % 4];
        chain = __vimax3_s32(chain, bits_of(scores[i]), bits_of(scores[i + 1]));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        bits[half] = max(chains[half], chains[half + 2]);
        bits[half] = max(bits[half], __shfl_xor_sync(kFullWarp, bits[half], 1));
        bits[half] = max(bits[half], __shfl_xor_sync(kFullWarp, bits[half], 2));
        largest[half] = __int_as_float(bits[half]);
    }
    if (!__any_sync(kFullWarp, bits[0] < 0 || bits[1] < 0)) return;
    largest[0] = largest[1] = -kInfinity;
#pragma unroll
    for (int i = 0; i < kScores; ++i) largest[i % 4 / 2] = fmaxf(largest[i % 4 / 2], scores[i]);
#pragma unroll
    for (int half = 0; half < 2; ++half) largest[half] = quad_max(largest[half]);
}

// P of the keys of some fragments, from the first on, as the second product takes it. Where a value of the
// warp is near a tie, its pair is computed again.
static __device__ __forceinline__ void exponentiate(uint32_t (&weights)[kKeySteps][4],
                                                    const float (&scores)[kScores], const float (&max)[2],
                                                    float scale, int first) {
    auto exponent = [&](int f, int half, int column) {
        return __fmaf_rn(scores[4 * f + 2 * half + column], scale, -max[half]);
    };
    TieWatch<kExp2Over, kExp2Under> watch;
#pragma unroll
    for (int f = first; f < first + kWatchedFragments; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float low = approximate_exp2(exponent(f, half, 0)),
                  high = approximate_exp2(exponent(f, half, 1));
            watch.see(low, high);
            weights[f / 2][f % 2 * 2 + half] = pack_bf16(low, high);
        }
    }
    if (!__any_sync(kFullWarp, watch.is_near_tie())) return;
#pragma unroll
    for (int f = first; f < first + kWatchedFragments; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float low = exponent(f, half, 0), high = exponent(f, half, 1);
            TieWatch<kExp2Over, kExp2Under> of_pair;
            of_pair.see(approximate_exp2(low), approximate_exp2(high));
            if (__any_sync(kFullWarp, of_pair.is_near_tie()))
                weights[f / 2][f % 2 * 2 + half] = pack_bf16(contract_exp2(low), contract_exp2(high));
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
    float largest[2];
    find_largest(largest, scores);
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) tile.max[half] = __fmul_rn(largest[half], scale);
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
