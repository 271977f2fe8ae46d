// attention.cuh -- what both attention kernels share: the problem, one tile, the fold.
//
// Rows of a problem are (new token, head of the group): row r is token r / group_size, head r % group_size
// of the kv head's group. So the heads that share keys sit in one instruction, in decode and in prefill
// alike.

#pragma once
#include "../common/cuda_status.h"
#include "../common/exp2.cuh"
#include "../common/kv_tile.cuh"
#include "../common/ptx.cuh"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kHeadDim = kTileCols;
constexpr int kTileKeys = NUMERICS_TILE;
constexpr int kSegmentKeys = NUMERICS_TILE * NUMERICS_SEGMENT;
constexpr int kFragmentRows = 16;  // query rows of one instruction
constexpr int kKvTileBytes =
    kTileKeys * kHeadDim * (int)sizeof(bf16);  // K or V of one attention tile, 16 KiB
constexpr int kKeyFragments = kTileKeys / 8;
constexpr int kDimFragments = kHeadDim / 8;
constexpr int kQuerySteps = kHeadDim / NUMERICS_STEP;
constexpr int kKeySteps = kTileKeys / NUMERICS_STEP;

struct AttentionProblem {
    bf16 *out;      // [num_tokens, num_heads, head_dim]
    const bf16 *q;  // [num_tokens, num_heads, head_dim]
    KvLayer cache;
    const int32_t *cu_seqlens_q;
    const int32_t *seq_lens;
    const int32_t *block_tables;
    const int32_t *sequences;  // [num_seqs], those to be taken, or null: all
    int max_blocks_per_seq;
    int num_seqs;
    int num_heads;
    int group_size;  // query heads per kv head
    int max_seq_len_q;
    int max_seq_len;
    float scale;  // log2(e) / sqrt(head_dim)
};

// Which kernel takes a sequence: decode if its rows fit one instruction and its segments the shared memory.
__host__ __device__ inline bool fits_decode(int seq_len_q, int group_size) {
    return seq_len_q * group_size <= kFragmentRows;
}
int decode_max_seq_len(void);

Status launch_attention_decode(const AttentionProblem &problem, cudaStream_t stream);
// `takes_all`: decoding sequences too, which otherwise are left to the decode kernel.
Status launch_attention_prefill(const AttentionProblem &problem, bool takes_all, cudaStream_t stream);

// One sequence of the batch.
struct Sequence {
    int first_token;  // row of its first new token in the step
    int num_new;
    int len;
    const int32_t *block_table;

    __device__ Sequence(const AttentionProblem &problem, int index) {
        if (problem.sequences != nullptr) index = problem.sequences[index];
        first_token = problem.cu_seqlens_q[index];
        num_new = problem.cu_seqlens_q[index + 1] - first_token;
        len = problem.seq_lens[index];
        block_table = problem.block_tables + (size_t)index * problem.max_blocks_per_seq;
    }

    __device__ int num_rows(int group_size) const { return num_new * group_size; }
    __device__ int position(int row, int group_size) const { return len - num_new + row / group_size; }
};

// What a warp knows of its 16 rows after some tiles. This lane holds rows group and group + 8 (index
// `half`); of each, columns 2 quad and 2 quad + 1 of every eight.
struct RowState {
    float max[2];
    float sum[2];
    float out[kDimFragments][4];  // element 2 half + column
};

// Starts the copies of K and V of one tile; keys the sequence does not have become zero. All kThreads
// threads take part, `thread` counts them.
template <int kThreads>
static __device__ __forceinline__ void fill_kv_tile(uint32_t k_tile, uint32_t v_tile, const KvLayer &cache,
                                                    const Sequence &sequence, int head, int tile,
                                                    int thread) {
    constexpr int kRowsAtOnce = kThreads / kChunksPerRow;
    static_assert(16 % kRowsAtOnce == 0, "the rows of one pass must share a KV block");
    int block = 0;
#pragma unroll
    for (int pass = 0; pass < kTileKeys / kRowsAtOnce; ++pass) {
        int row = pass * kRowsAtOnce + thread / kChunksPerRow, chunk = thread % kChunksPerRow;
        int key = tile * kTileKeys + row;
        bool exists = key < sequence.len;
        if (pass * kRowsAtOnce % 16 == 0 && exists) block = sequence.block_table[key / cache.block_size];
        const bf16 *from = cache.data;
        if (exists) {
            from += kv_tile_offset(block, head, cache.num_kv_heads, cache.block_size) +
                    (key % cache.block_size) * kTileCols + chunk * kChunkValues;
        }
        // The chunk keeps its place in the row, swizzle and all: see kv_tile.cuh.
        int to = row * kTileCols * (int)sizeof(bf16) + chunk * 16;
        copy_async_16(k_tile + to, from, exists ? 16 : 0);
        copy_async_16(v_tile + to, exists ? from + cache.block_size * kTileCols : from, exists ? 16 : 0);
    }
}

// The 16 x 64 query fragment of rows first_row .. first_row + 15 of one kv head; rows beyond the last are
// zero.
static __device__ __forceinline__ void load_query(uint32_t (&query)[kQuerySteps][4],
                                                  const AttentionProblem &problem, const Sequence &sequence,
                                                  int kv_head, int first_row, int lane) {
    int group = lane / 4, quad = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = first_row + group + 8 * half;
        bool exists = row < sequence.num_rows(problem.group_size);
        int token = sequence.first_token + row / problem.group_size;
        int head = kv_head * problem.group_size + row % problem.group_size;
        const bf16 *from = problem.q + ((size_t)token * problem.num_heads + head) * kHeadDim + 2 * quad;
#pragma unroll
        for (int step = 0; step < kQuerySteps; ++step) {
            query[step][half] = exists ? load_pair(from + step * NUMERICS_STEP) : 0;
            query[step][half + 2] = exists ? load_pair(from + step * NUMERICS_STEP + 8) : 0;
        }
    }
}

// The four lanes of a quad hold a row together; these combine them, every lane getting the same bits.
static __device__ __forceinline__ float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, 1));
    return fmaxf(value, __shfl_xor_sync(kFullWarp, value, 2));
}

static __device__ __forceinline__ float quad_sum(float value) {
    value = __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, 1));
    return __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, 2));
}

// One tile by itself, docs/numerics.md section 4. Row `half` sees the tile's first visible[half] keys;
// where that is none, the state is meaningless and must not be folded.
static __device__ __forceinline__ void attend_tile(RowState &state, const uint32_t (&query)[kQuerySteps][4],
                                                   uint32_t k_tile, uint32_t v_tile,
                                                   const int (&visible)[2], float scale, int lane) {
    const float kMinusInfinity = __int_as_float(0xff800000);
    int quad = lane % 4;
    float scores[kKeyFragments][4];
    float largest[2] = {kMinusInfinity, kMinusInfinity};
#pragma unroll
    for (int f = 0; f < kKeyFragments; ++f) {
        uint32_t keys[2][4];  // chunks 0 .. 3 and 4 .. 7 of eight keys
        int row = f * 8 + lane % 8, chunk = lane / 8;
        load_matrix_x4(keys[0], k_tile + tile_offset(row, chunk) * (int)sizeof(bf16));
        load_matrix_x4(keys[1], k_tile + tile_offset(row, chunk + 4) * (int)sizeof(bf16));
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[f][e] = 0.0f;
#pragma unroll
        for (int step = 0; step < kQuerySteps; ++step) {
            const uint32_t (&chunks)[4] = keys[step / 2];
            mma_m16n8k16(scores[f], query[step], chunks[step % 2 * 2], chunks[step % 2 * 2 + 1]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            int key = f * 8 + 2 * quad + e % 2;
            if (key < visible[e / 2]) largest[e / 2] = fmaxf(largest[e / 2], scores[f][e]);
        }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        state.max[half] = __fmul_rn(quad_max(largest[half]), scale);
        state.sum[half] = 0.0f;
    }
    uint32_t probabilities[kKeyFragments][2];  // bf16 pairs, as the second product takes them
#pragma unroll
    for (int f = 0; f < kKeyFragments; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float p[2];
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                int key = f * 8 + 2 * quad + column;
                float exponent = __fmaf_rn(scores[f][2 * half + column], scale, -state.max[half]);
                p[column] = key < visible[half] ? contract_exp2(exponent) : 0.0f;
            }
            uint32_t pair = pack_bf16(p[0], p[1]);
            probabilities[f][half] = pair;
            state.sum[half] = __fadd_rn(state.sum[half], __fadd_rn(low_float(pair), high_float(pair)));
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) state.sum[half] = quad_sum(state.sum[half]);

#pragma unroll
    for (int f = 0; f < kDimFragments; ++f) {
#pragma unroll
        for (int e = 0; e < 4; ++e) state.out[f][e] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
        const uint32_t weights[4] = {probabilities[2 * step][0], probabilities[2 * step][1],
                                     probabilities[2 * step + 1][0], probabilities[2 * step + 1][1]};
#pragma unroll
        for (int f = 0; f < kDimFragments;
             f += 2) {  // two chunks of eight columns, two groups of eight keys
            uint32_t values[4];
            int row = step * NUMERICS_STEP + lane % 16, chunk = f + lane / 16;
            load_matrix_x4_transposed(values, v_tile + tile_offset(row, chunk) * (int)sizeof(bf16));
            mma_m16n8k16(state.out[f], weights, values[0], values[1]);
            mma_m16n8k16(state.out[f + 1], weights, values[2], values[3]);
        }
    }
}

// The factors of a fold, and its new maximum and sum.
struct FoldFactors {
    float keep;  // for what was there
    float take;  // for what comes
};

static __device__ __forceinline__ FoldFactors fold_sums(float &max, float &sum, float new_max,
                                                        float new_sum) {
    float largest = fmaxf(max, new_max);
    FoldFactors factors = {contract_exp2(__fsub_rn(max, largest)),
                           contract_exp2(__fsub_rn(new_max, largest))};
    max = largest;
    sum = __fmaf_rn(new_sum, factors.take, __fmul_rn(sum, factors.keep));
    return factors;
}

static __device__ __forceinline__ float fold_value(float value, float new_value, FoldFactors factors) {
    return __fmaf_rn(new_value, factors.take, __fmul_rn(value, factors.keep));
}
