// decode_batch_tile.cuh -- one attention tile of a decode batch, keys as the rows of an instruction:
// sixteen keys by eight columns of heads.
//
// Lane (g, q) of the warp holds keys g and g + 8 of sixteen, for columns 2 q and 2 q + 1. Where a kv head
// has at most four heads (kPaired), columns 4 .. 7 repeat them, and of the two lanes with the same scores
// one goes on with keys g, the other with keys g + 8.

#pragma once
#include "decode_tile.cuh"

constexpr int kPairedHeads = 4;
constexpr int kDimTiles = kTileCols / 16;
constexpr int kStateVectors = 5;  // of four floats, that a lane keeps of a row

// Of two columns of heads; values[f][2 h + e] is dimension 16 f + 8 h + g of column 2 q + e.
struct RowState {
    float max[2], sum[2];
    float values[kDimTiles][4];
};

// to = first folded with second; `to` may be either. One of a fold's two factors is exp2(0) = 1; the other
// depends on the difference alone.
static __device__ __forceinline__ void fold(RowState &to, const RowState &first, const RowState &second) {
    float keep[2], take[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        float difference = __fsub_rn(first.max[e], second.max[e]);
        float shrink = contract_exp2(-fabsf(difference));
        keep[e] = difference >= 0.0f ? 1.0f : shrink;
        take[e] = difference >= 0.0f ? shrink : 1.0f;
        to.max[e] = fmaxf(first.max[e], second.max[e]);
        to.sum[e] = __fmaf_rn(second.sum[e], take[e], __fmul_rn(first.sum[e], keep[e]));
    }
#pragma unroll
    for (int f = 0; f < kDimTiles; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            to.values[f][i] =
                __fmaf_rn(second.values[f][i], take[i % 2], __fmul_rn(first.values[f][i], keep[i % 2]));
    }
}

// A row's state outside of registers. A lane finds what the same lane of another warp has put there; of
// lanes with the same columns one does it.
template <bool kPaired>
struct StateBox {
    static constexpr int kLanes = kPaired ? kWarp / 2 : kWarp;
    float4 vectors[kStateVectors][kLanes];

    static __device__ __forceinline__ int place() {
        int lane = (int)threadIdx.x % kWarp;
        return kPaired ? lane / 4 * 2 + lane % 2 : lane;
    }
    __device__ __forceinline__ void store(const RowState &state) {
        if (kPaired && threadIdx.x % 4 >= 2) return;
#pragma unroll
        for (int f = 0; f < kDimTiles; ++f)
            vectors[f][place()] =
                make_float4(state.values[f][0], state.values[f][1], state.values[f][2], state.values[f][3]);
        vectors[kDimTiles][place()] = make_float4(state.max[0], state.max[1], state.sum[0], state.sum[1]);
    }
    __device__ __forceinline__ void load(RowState &state) const {
        const float4 *from = &vectors[0][place()];
#pragma unroll
        for (int f = 0; f < kDimTiles; ++f) set(state.values[f], from[f * kLanes]);
        float4 v = from[kDimTiles * kLanes];
        state.max[0] = v.x, state.max[1] = v.y, state.sum[0] = v.z, state.sum[1] = v.w;
    }
    // From global memory, where other blocks write.
    __device__ __forceinline__ void load_far(RowState &state) const {
        const float4 *from = &vectors[0][place()];
#pragma unroll
        for (int f = 0; f < kDimTiles; ++f) set(state.values[f], __ldcg(from + f * kLanes));
        float4 v = __ldcg(from + kDimTiles * kLanes);
        state.max[0] = v.x, state.max[1] = v.y, state.sum[0] = v.z, state.sum[1] = v.w;
    }
    static __device__ __forceinline__ void set(float (&values)[4], float4 v) {
        values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
    }
};

// Scores of the tile's keys: scores[s][2 h + e] is key 16 s + g + 8 h, or where paired + 8 (q / 2).
template <bool kPaired>
struct TileScores {
    static constexpr int kPerStep = kPaired ? 2 : 4;
    float values[kKeySteps][kPerStep];

    // The keys of one half, whose rows start at `rows`.
    __device__ __forceinline__ void score_half(int half, const uint32_t (&query)[kDimSteps][2],
                                               uint32_t rows) {
        int lane = (int)threadIdx.x % kWarp;
        uint32_t place = rows + tile_offset(lane % 16, lane / 16) * (int)sizeof(bf16);
        bool takes_high = lane % 4 >= 2;
#pragma unroll
        for (int s = 0; s < kStepsPerHalf; ++s) {
            float acc[4] = {};
#pragma unroll
            for (int k = 0; k < kDimSteps; ++k) {
                uint32_t keys[4];
                // Two chunks on, under the swizzle.
                load_matrix_x4(keys, (place ^ (k * 32)) + s * kStepBytes);
                mma_m16n8k16(acc, keys, query[k][0], query[k][1]);
            }
            float (&to)[kPerStep] = values[half * kStepsPerHalf + s];
#pragma unroll
            for (int i = 0; i < kPerStep; ++i) to[i] = kPaired && takes_high ? acc[i + 2] : acc[i];
        }
    }
    // Keys from num_keys on do not count: their P becomes +0.
    __device__ __forceinline__ void mask(int num_keys) {
        int lane = (int)threadIdx.x % kWarp;
#pragma unroll
        for (int s = 0; s < kKeySteps; ++s) {
#pragma unroll
            for (int i = 0; i < kPerStep; ++i) {
                int key = s * NUMERICS_STEP + lane / 4 + 8 * (kPaired ? lane % 4 / 2 : i / 2);
                if (key >= num_keys) values[s][i] = __int_as_float(0xff800000);
            }
        }
    }
};

// P of a tile as the second product takes it -- weights[s] are column g's keys 16 s + 2 q, + 1, then + 8,
// + 9 -- its maxima and sums. Where paired, columns 4 .. 7 hold nothing of use.
template <bool kPaired>
static __device__ __forceinline__ void soften(uint32_t (&weights)[kKeySteps][2], RowState &state,
                                              const TileScores<kPaired> &scores, float scale) {
    constexpr int kPerStep = TileScores<kPaired>::kPerStep;
    float smallest[2];
    bool is_in_range = true;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        float largest = scores.values[0][e];
        smallest[e] = scores.values[0][e];
#pragma unroll
        for (int s = 0; s < kKeySteps; ++s) {
#pragma unroll
            for (int i = e; i < kPerStep; i += 2) {
                largest = fmaxf(largest, scores.values[s][i]);
                smallest[e] = min_or_nan(smallest[e], scores.values[s][i]);
            }
        }
#pragma unroll
        for (int offset = kPaired ? 2 : 4; offset < kWarp; offset *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
        state.max[e] = __fmul_rn(largest, scale);
        is_in_range &= __fmaf_rn(smallest[e], scale, -state.max[e]) >= kSmallestExponent;
    }
    uint32_t pairs[kKeySteps][kPerStep / 2];  // of the two columns, keys down the lanes
    auto exponentiate = [&](auto exp2_of) {
#pragma unroll
        for (int s = 0; s < kKeySteps; ++s) {
#pragma unroll
            for (int h = 0; h < kPerStep / 2; ++h) {
                float p[2];
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    p[e] = exp2_of(__fmaf_rn(scores.values[s][2 * h + e], scale, -state.max[e]));
                pairs[s][h] = pack_bf16(p[0], p[1]);
            }
        }
    };
    if (__all_sync(kFullWarp, is_in_range)) {
        exponentiate([](float x) { return exp2_in_range(x); });
    } else {  // keys that do not count, of very different size, or not finite
        exponentiate([](float x) { return contract_exp2(x); });
    }
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
        weights[s][0] = transpose_matrix(pairs[s][0]);
        weights[s][1] = kPaired ? __shfl_xor_sync(kFullWarp, weights[s][0], kWarp / 2)
                                : transpose_matrix(pairs[s][kPerStep / 2 - 1]);
#pragma unroll
        for (int i = 0; i < 2; ++i)
            sum = __fadd_rn(sum, __fadd_rn(low_float(weights[s][i]), high_float(weights[s][i])));
    }
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 2));
    int column = (int)threadIdx.x % 4 * 2 % (kPaired ? kPairedHeads : kMaxGroup);
#pragma unroll
    for (int e = 0; e < 2; ++e) state.sum[e] = __shfl_sync(kFullWarp, sum, (column + e) * 4);
}

// The values of half the tile's keys, whose rows start at `rows`, weighed and added up.
static __device__ __forceinline__ void weigh_half(RowState &state, int half,
                                                  const uint32_t (&weights)[kKeySteps][2], uint32_t rows) {
    int lane = (int)threadIdx.x % kWarp;
    uint32_t place = rows + tile_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2) * (int)sizeof(bf16);
#pragma unroll
    for (int s = 0; s < kStepsPerHalf; ++s) {
#pragma unroll
        for (int f = 0; f < kDimTiles; ++f) {
            uint32_t values[4];
            load_matrix_x4_transposed(values, (place ^ (f * 32)) + s * kStepBytes);
            const uint32_t (&p)[2] = weights[half * kStepsPerHalf + s];
            mma_m16n8k16(state.values[f], values, p[0], p[1]);
        }
    }
}

// What follows the last key in a half counts as zero, whatever the memory holds.
static __device__ __forceinline__ void clear_rows(uint32_t rows, int first) {
    int lane = (int)threadIdx.x % kWarp;
    for (int i = first * kChunksPerRow + lane; i < kPieceKeys * kChunksPerRow; i += kWarp)
        store_shared_zero_16(rows + i * 16);
    fence_async_proxy();  // they come before the copy that fills the slot again
    __syncwarp();         // and before any lane reads them
}
