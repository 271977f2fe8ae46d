// decode_attention.cuh -- the attention phase of the persistent decode kernel: RoPE, cache write, tiles,
// folds.
//
// A task is one segment (1024 keys) of one sequence and kv head. Eight warps take a tile each, straight
// from the cache into registers; the block folds its tiles in order, and where a row has several segments
// the last block to finish folds those, in order. The new key and value are not read back from the cache
// but kept in shared memory.

#pragma once
#include "decode_step.cuh"

constexpr int kStepDims = NUMERICS_STEP;
constexpr int kDimSteps = kTileCols / kStepDims;

// Partial results of segments: [num_seqs, num_heads, segments, kPartialColumns] floats.
struct AttentionWork {
    const int32_t *seq_lens;
    const int32_t *block_tables;
    int max_blocks_per_seq;
    int num_seqs;
    int max_segments;
    float *segments;
    unsigned *tickets;  // [num_seqs, num_kv_heads], zero between uses
    float scale;
};

// movmatrix (PTX ISA 9.7.14.5.17): transpose an 8 x 8 tile of bf16 held across the warp.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t value) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(value));
    return transposed;
}

__device__ __forceinline__ float bf16_product(float a, float b) {
    return to_float(to_bf16(__fmul_rn(a, b)));
}

// Pair `pair` of one head through RoPE, docs/numerics.md section 6.
__device__ __forceinline__ void rotate_pair(bf16 *out, const bf16 *x, const bf16 *table_row, int pair) {
    constexpr int kHalf = kTileCols / 2;
    float cosine = to_float(table_row[pair]), sine = to_float(table_row[kHalf + pair]);
    float low = to_float(__ldcg(x + pair)), high = to_float(__ldcg(x + kHalf + pair));
    out[pair] = to_bf16(__fsub_rn(bf16_product(low, cosine), bf16_product(high, sine)));
    out[kHalf + pair] = to_bf16(__fadd_rn(bf16_product(high, cosine), bf16_product(low, sine)));
}

// Query, new key and new value of a task into shared memory, rotated; the block of the last segment also
// writes the cache.
__device__ __forceinline__ void load_task(StepShared &shared, const DecodeProblem &problem,
                                          const DecodeLayer &layer, int sequence, int kv_head, int group,
                                          int position, int slot, bool writes) {
    constexpr int kHalf = kTileCols / 2;
    const bf16 *table_row = problem.rope_table + (size_t)position * kTileCols;
    int thread = (int)threadIdx.x;
    if (thread < group * kHalf) {
        int head = thread / kHalf;
        const bf16 *q =
            problem.q + ((size_t)sequence * problem.num_heads + kv_head * group + head) * kTileCols;
        rotate_pair(shared.attention.query[head], q, table_row, thread % kHalf);
    }
    size_t kv = ((size_t)sequence * problem.num_kv_heads + kv_head) * kTileCols;
    int last = kConsumers - kWarp, from_last = thread - last;
    if (from_last >= 0) rotate_pair(shared.attention.key, problem.k + kv, table_row, from_last);
    int from_value = thread - (last - kWarp);
    if (from_value >= 0 && from_value < kChunksPerRow) {
        store_vector(shared.attention.value + from_value * kVector,
                     load_fresh_vector(problem.v + kv + from_value * kVector));
    }
    consumer_barrier();  // query, key and value visible to every warp
    if (writes && from_value >= 0 && from_value < 2 * kChunksPerRow) {
        const KvLayer &cache = layer.cache;
        int chunk = from_value % kChunksPerRow, is_value = from_value / kChunksPerRow;
        bf16 *tile =
            cache.data +
            kv_tile_offset(slot / cache.block_size, kv_head, cache.num_kv_heads, cache.block_size) +
            (is_value ? (size_t)cache.block_size * kTileCols : 0);
        const bf16 *row = is_value ? shared.attention.value : shared.attention.key;
        store_vector(tile + tile_offset(slot % cache.block_size, chunk),
                     load_vector(row + chunk * kVector));
    }
}

// One tile by one warp: rows are the heads of the group (lane group g holds head g), the last key that
// exists is at `position`. Writes maximum, sum and values to `partial`.
__device__ __forceinline__ void attend_tile_from_cache(StepShared &shared, const KvLayer &cache,
                                                       const int32_t *block_table, int kv_head,
                                                       int group_size, int tile, int position, float scale,
                                                       float (*partial)[kPartialColumns]) {
    int lane = (int)threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    int first_key = tile * NUMERICS_TILE, num_keys = min(NUMERICS_TILE, position + 1 - first_key);
    int new_key =
        position - first_key;  // the key that is not in the cache yet; beyond the tile if not here
    int blocks_per_tile = NUMERICS_TILE / cache.block_size;
    int block = 0;
    if (lane < blocks_per_tile && lane * cache.block_size < num_keys)
        block = block_table[tile * blocks_per_tile + lane];

    // Row of `key` in the cache, K's or V's; lanes of one group ask for the same key.
    auto cached_row = [&](int key) {
        int id = __shfl_sync(kFullWarp, block, key / cache.block_size);
        return cache.data + kv_tile_offset(id, kv_head, cache.num_kv_heads, cache.block_size) +
               (size_t)(key % cache.block_size) * kTileCols;
    };

    // Within a step the order of the products is free, so lane q takes the four neighbours 4q .. 4q + 3 of
    // both operands: eight bytes at a time.
    uint32_t query[kDimSteps][4] = {};
    if (g < group_size) {
#pragma unroll
        for (int s = 0; s < kDimSteps; ++s) {
            uint2 pairs =
                *reinterpret_cast<const uint2 *>(&shared.attention.query[g][s * kStepDims + 4 * q]);
            query[s][0] = pairs.x;
            query[s][2] = pairs.y;
        }
    }
    float scores[NUMERICS_TILE / 8][2];
    constexpr int kAtOnce = 4;  // eight keys each: 1 KiB per warp in flight and eight keys
#pragma unroll
    for (int first = 0; first < NUMERICS_TILE / 8; first += kAtOnce) {
        uint2 keys[kAtOnce][kDimSteps];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            int key = (first + j) * 8 + g;
            const bf16 *row = cached_row(key);
#pragma unroll
            for (int s = 0; s < kDimSteps; ++s) {
                int dim = s * kStepDims + 4 * q;
                const bf16 *from = row + (((dim / kVector) ^ (key % 8)) * kVector + dim % kVector);
                keys[j][s] = make_uint2(0, 0);
                if (key < new_key) keys[j][s] = *reinterpret_cast<const uint2 *>(from);
                if (key == new_key)
                    keys[j][s] = *reinterpret_cast<const uint2 *>(shared.attention.key + dim);
            }
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            float acc[4] = {};
#pragma unroll
            for (int s = 0; s < kDimSteps; ++s) mma_m16n8k16(acc, query[s], keys[j][s].x, keys[j][s].y);
            scores[first + j][0] = acc[0];
            scores[first + j][1] = acc[1];
        }
    }

    float largest = __int_as_float(0xff800000);
#pragma unroll
    for (int j = 0; j < NUMERICS_TILE / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (j * 8 + 2 * q + e < num_keys) largest = fmaxf(largest, scores[j][e]);
    }
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
    float max = __fmul_rn(largest, scale), sum = 0.0f;
    uint32_t p[NUMERICS_TILE / 8];
#pragma unroll
    for (int j = 0; j < NUMERICS_TILE / 8; ++j) {
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float exponent = __fmaf_rn(scores[j][e], scale, -max);
            pair[e] = j * 8 + 2 * q + e < num_keys ? contract_exp2(exponent) : 0.0f;
        }
        p[j] = pack_bf16(pair[0], pair[1]);
        sum = __fadd_rn(sum, __fadd_rn(low_float(p[j]), high_float(p[j])));
    }
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 2));

    // V: lane (g, q) loads sixteen bytes, columns 32 half + 8 q .., of key g; register r of the transposed
    // tile then serves the output columns 32 half + 8 q' + 2 r + e of the lanes q'.
    float out[2][4][4] = {};
#pragma unroll
    for (int s = 0; s < NUMERICS_TILE / NUMERICS_STEP; ++s) {
        uint4 values[2][2];  // [eight keys][half]
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            int key = s * NUMERICS_STEP + j * 8 + g;
            const bf16 *row = cached_row(key) + (size_t)cache.block_size * kTileCols;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int chunk = half * 4 + q;
                values[j][half] = make_uint4(0, 0, 0, 0);
                if (key < new_key) values[j][half] = load_vector(row + ((chunk ^ (key % 8)) * kVector));
                if (key == new_key) values[j][half] = load_vector(shared.attention.value + chunk * kVector);
            }
        }
        const uint32_t weights[4] = {p[2 * s], 0, p[2 * s + 1], 0};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t low[4] = {values[0][half].x, values[0][half].y, values[0][half].z,
                                     values[0][half].w};
            const uint32_t high[4] = {values[1][half].x, values[1][half].y, values[1][half].z,
                                      values[1][half].w};
#pragma unroll
            for (int r = 0; r < 4; ++r)
                mma_m16n8k16(out[half][r], weights, transpose_matrix(low[r]), transpose_matrix(high[r]));
        }
    }
    if (g >= group_size) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            partial[g][32 * half + 8 * q + 2 * r] = out[half][r][0];
            partial[g][32 * half + 8 * q + 2 * r + 1] = out[half][r][1];
        }
    }
    if (q == 0) {
        partial[g][kTileCols] = max;
        partial[g][kTileCols + 1] = sum;
    }
}

// One value of a partial result with the maximum and sum of its row.
struct FoldState {
    float max, sum, value;

    __device__ void fold(float new_max, float new_sum, float new_value) {
        float largest = fmaxf(max, new_max);
        float keep = contract_exp2(__fsub_rn(max, largest)),
              take = contract_exp2(__fsub_rn(new_max, largest));
        max = largest;
        sum = __fmaf_rn(new_sum, take, __fmul_rn(sum, keep));
        value = __fmaf_rn(new_value, take, __fmul_rn(value, keep));
    }
    __device__ bf16 result() const { return to_bf16(__fmul_rn(value, __frcp_rn(sum))); }
};

// Where a row's output and its segments lie.
static __device__ __forceinline__ size_t row_index(const DecodeProblem &problem, int sequence, int kv_head,
                                                   int row) {
    return (size_t)sequence * problem.num_heads + kv_head * (problem.num_heads / problem.num_kv_heads) +
           row;
}

// The block's tiles into one segment: the result where it is the only one, else its partial result.
static __device__ void fold_tiles(StepShared &shared, const DecodeProblem &problem,
                                  const AttentionWork &work, int sequence, int kv_head, int segment,
                                  int num_segments, int tiles) {
    int num_values = problem.num_heads / problem.num_kv_heads * kTileCols;
    for (int i = (int)threadIdx.x; i < num_values; i += kConsumers) {
        int row = i / kTileCols, column = i % kTileCols;
        const auto &parts = shared.attention.tiles;
        FoldState state = {parts[0][row][kTileCols], parts[0][row][kTileCols + 1], parts[0][row][column]};
        for (int t = 1; t < tiles; ++t)
            state.fold(parts[t][row][kTileCols], parts[t][row][kTileCols + 1], parts[t][row][column]);
        size_t index = row_index(problem, sequence, kv_head, row);
        if (num_segments == 1) {
            problem.attn[index * kTileCols + column] = state.result();
            continue;
        }
        float *part = work.segments + (index * work.max_segments + segment) * kPartialColumns;
        part[column] = state.value;
        if (column == 0) part[kTileCols] = state.max;
        if (column == 1) part[kTileCols + 1] = state.sum;
    }
}

// The last block to finish a sequence and kv head folds its segments.
static __device__ void fold_segments(StepShared &shared, const DecodeProblem &problem,
                                     const AttentionWork &work, int sequence, int kv_head,
                                     int num_segments) {
    __threadfence();     // this block's segment is out before its ticket
    consumer_barrier();  // every thread's share of it
    if (threadIdx.x == 0) {
        unsigned *ticket = work.tickets + sequence * problem.num_kv_heads + kv_head;
        shared.is_last = atomicAdd(ticket, 1) == (unsigned)num_segments - 1;
        if (shared.is_last) *ticket = 0;
    }
    consumer_barrier();  // the verdict visible to every thread
    if (!shared.is_last) return;
    __threadfence();  // the other blocks' segments after their tickets
    int num_values = problem.num_heads / problem.num_kv_heads * kTileCols;
    for (int i = (int)threadIdx.x; i < num_values; i += kConsumers) {
        int row = i / kTileCols, column = i % kTileCols;
        size_t index = row_index(problem, sequence, kv_head, row);
        const float *part = work.segments + index * work.max_segments * kPartialColumns;
        FoldState state = {__ldcg(part + kTileCols), __ldcg(part + kTileCols + 1), __ldcg(part + column)};
        for (int s = 1; s < num_segments; ++s) {
            part += kPartialColumns;
            state.fold(__ldcg(part + kTileCols), __ldcg(part + kTileCols + 1), __ldcg(part + column));
        }
        problem.attn[index * kTileCols + column] = state.result();
    }
}

// The whole phase of one layer; consumers only.
static __device__ void attention_phase(StepShared &shared, const DecodeProblem &problem,
                                       const AttentionWork &work, const DecodeLayer &layer) {
    const KvLayer &cache = layer.cache;
    int group = problem.num_heads / problem.num_kv_heads;
    int warp = (int)threadIdx.x / kWarp;
    int task = (int)blockIdx.x;
    for (int sequence = 0; sequence < work.num_seqs; ++sequence) {
        int position = work.seq_lens[sequence] - 1;
        int num_segments = position / (NUMERICS_TILE * NUMERICS_SEGMENT) + 1;
        int num_tasks = num_segments * problem.num_kv_heads;
        const int32_t *block_table = work.block_tables + (size_t)sequence * work.max_blocks_per_seq;
        for (; task < num_tasks; task += (int)gridDim.x) {
            int segment = task / problem.num_kv_heads, kv_head = task % problem.num_kv_heads;
            int slot =
                block_table[position / cache.block_size] * cache.block_size + position % cache.block_size;
            load_task(shared, problem, layer, sequence, kv_head, group, position, slot,
                      segment == num_segments - 1);
            int first_tile = segment * NUMERICS_SEGMENT;
            int tiles = min(NUMERICS_SEGMENT, position / NUMERICS_TILE + 1 - first_tile);
            if (warp < tiles) {
                attend_tile_from_cache(shared, cache, block_table, kv_head, group, first_tile + warp,
                                       position, work.scale, shared.attention.tiles[warp]);
            }
            consumer_barrier();  // the tiles' partial results visible to the threads that fold them
            fold_tiles(shared, problem, work, sequence, kv_head, segment, num_segments, tiles);
            if (num_segments > 1) fold_segments(shared, problem, work, sequence, kv_head, num_segments);
            consumer_barrier();  // shared memory is read before the next task writes it
        }
        task -= num_tasks;
    }
}
