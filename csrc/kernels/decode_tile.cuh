// decode_tile.cuh -- one attention tile for one new token: the heads of a group are a fragment's rows.
//
// A piece is half a tile's keys, or values: 64 rows of shared memory in tile.cuh's layout. Lane (g, q) of
// the warp holds row g; rows of the fragment beyond eight are zero.

#pragma once
#include "../common/exp2.cuh"
#include "../common/numerics.h"
#include "../common/ptx.cuh"
#include "../common/tile.cuh"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kMaxGroup = 8;  // query heads per kv head
constexpr int kPieceKeys = NUMERICS_TILE / 2;
constexpr int kKeyBytes = kTileCols * (int)sizeof(bf16);
constexpr int kKeyGroups = NUMERICS_TILE / 8;
constexpr int kDimGroups = kTileCols / 8;
constexpr int kDimSteps = kTileCols / NUMERICS_STEP;
constexpr int kKeySteps = NUMERICS_TILE / NUMERICS_STEP;
constexpr int kStepsPerHalf = kPieceKeys / NUMERICS_STEP;
constexpr int kStepBytes = NUMERICS_STEP * kKeyBytes;  // of sixteen keys
constexpr int kSegmentKeys = NUMERICS_TILE * NUMERICS_SEGMENT;
constexpr int kPartialColumns = kTileCols + 2;  // of a segment's result: 64 values, maximum, sum

// P of a row and its sum, from its scores: this lane holds keys 8 j + 2 q and + 1. Keys that do not count
// have a score of minus infinity, which makes their P +0.
static __device__ __forceinline__ void softmax_row(uint32_t (&p)[kKeyGroups], float &max, float &sum,
                                                   const float (&scores)[kKeyGroups][2], float scale) {
    float largest = __int_as_float(0xff800000);
#pragma unroll
    for (int j = 0; j < kKeyGroups; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) largest = fmaxf(largest, scores[j][e]);
    }
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
    max = __fmul_rn(largest, scale);
    sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kKeyGroups; ++j) {
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float exponent = __fmaf_rn(scores[j][e], scale, -max);
            pair[e] = contract_exp2(exponent);
        }
        p[j] = pack_bf16(pair[0], pair[1]);
        sum = __fadd_rn(sum, __fadd_rn(low_float(p[j]), high_float(p[j])));
    }
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 2));
}

// Scores of the heads (rows g) with the keys of kSteps steps that start at `rows`: of each step keys 2 q,
// 2 q + 1, + 8. All chains side by side.
template <int kSteps>
static __device__ __forceinline__ void score_keys(float (&scores)[kSteps][4],
                                                  const uint32_t (&query)[kDimSteps][2], uint32_t rows) {
    int lane = (int)threadIdx.x % kWarp;
    float acc[2 * kSteps][4] = {};
    uint32_t keys[2 * kSteps][2][4];  // of eight keys each: columns 0 .. 31 and 32 .. 63
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) {
        int row = i / 2 * 8 + lane % 8, chunk = i % 2 * 4 + lane / 8;
        load_matrix_x4(keys[i / 2][i % 2], rows + tile_offset(row, chunk) * (int)sizeof(bf16));
    }
#pragma unroll
    for (int s = 0; s < kDimSteps; ++s) {
        const uint32_t heads[4] = {query[s][0], 0, query[s][1], 0};
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i)
            mma_m16n8k16(acc[i], heads, keys[i][s / 2][s % 2 * 2], keys[i][s / 2][s % 2 * 2 + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) scores[i / 4][i % 4] = acc[i / 2][i % 2];
}

// Sixteen keys' values, whose first row is at `rows`, weighed with P and added up.
static __device__ __forceinline__ void weigh_values(float (&out)[kDimGroups][4], uint32_t low,
                                                    uint32_t high, uint32_t rows) {
    int lane = (int)threadIdx.x % kWarp;
    const uint32_t weights[4] = {low, 0, high, 0};
#pragma unroll
    for (int f = 0; f < kDimGroups; f += 2) {
        uint32_t values[4];  // keys + 0 and + 8 of columns f, then of columns f + 1
        load_matrix_x4_transposed(values, rows + tile_offset(lane % 16, f + lane / 16) * (int)sizeof(bf16));
        mma_m16n8k16(out[f], weights, values[0], values[1]);
        mma_m16n8k16(out[f + 1], weights, values[2], values[3]);
    }
}
