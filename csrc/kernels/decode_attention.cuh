// decode_attention.cuh -- the attention phase of the persistent decode kernel: RoPE, cache write, tiles,
// folds.
//
// A task is one segment (1024 keys) of one sequence and kv head. The producer streams the cached keys and
// values of a block's tasks through the ring like weights; eight warps take a tile each, the block folds
// its tiles in order, and where a row has several segments the last block to finish folds those, in order.
// The step's new key and value never pass through the cache: they are patched into the fragments.

#pragma once
#include "decode_step.cuh"

constexpr int kKeyGroups = NUMERICS_TILE / 8;
constexpr int kDimGroups = kTileCols / 8;
constexpr int kDimSteps = kTileCols / NUMERICS_STEP;
constexpr int kKeySteps = NUMERICS_TILE / NUMERICS_STEP;
constexpr int kSegmentKeys = NUMERICS_TILE * NUMERICS_SEGMENT;

// One segment of one sequence and kv head.
struct AttentionTask {
    int sequence, kv_head, segment;
    int position;      // of the new token
    int num_segments;  // of the sequence
    int first_tile, num_tiles;

    // Keys of a tile that are in the cache already, 0 .. 128.
    __device__ int cached_keys(int tile) const {
        return min(NUMERICS_TILE, position - tile * NUMERICS_TILE);
    }
    // K and V each take a piece per 64 cached keys.
    __device__ int pieces_of_tile(int tile) const {
        return 2 * ((cached_keys(tile) + kPieceKeys - 1) / kPieceKeys);
    }
};

// Calls visit(task) for each task of this block, in one order for the producer and the consumers.
template <typename Visit>
static __device__ __forceinline__ void for_own_tasks(const StepArguments &args, Visit visit) {
    int next = (int)blockIdx.x;
    for (int sequence = 0; sequence < args.num_seqs; ++sequence) {
        int position = args.seq_lens[sequence] - 1;
        int num_segments = position / kSegmentKeys + 1;
        int num_tasks = num_segments * args.problem.num_kv_heads;
        for (; next < num_tasks; next += (int)gridDim.x) {
            AttentionTask task;
            task.sequence = sequence;
            task.segment = next / args.problem.num_kv_heads;
            task.kv_head = next % args.problem.num_kv_heads;
            task.position = position;
            task.num_segments = num_segments;
            task.first_tile = task.segment * NUMERICS_SEGMENT;
            task.num_tiles = min(NUMERICS_SEGMENT, position / NUMERICS_TILE + 1 - task.first_tile);
            visit(task);
        }
        next -= num_tasks;
    }
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
static __device__ void load_task(AttentionShared &shared, const StepArguments &args, const KvLayer &cache,
                                 const AttentionTask &task) {
    constexpr int kHalf = kTileCols / 2;
    const DecodeProblem &problem = args.problem;
    int group = problem.num_heads / problem.num_kv_heads;
    const bf16 *table_row = problem.rope_table + (size_t)task.position * kTileCols;
    size_t kv = ((size_t)task.sequence * problem.num_kv_heads + task.kv_head) * kTileCols;
    int thread = (int)threadIdx.x;
    int for_key = thread - (kConsumers - kWarp), for_value = thread - (kConsumers - 2 * kWarp);
    if (thread < group * kHalf) {
        int head = thread / kHalf;
        const bf16 *q =
            problem.q +
            ((size_t)task.sequence * problem.num_heads + task.kv_head * group + head) * kTileCols;
        rotate_pair(shared.query[head], q, table_row, thread % kHalf);
    }
    if (for_key >= 0) rotate_pair(shared.key, problem.k + kv, table_row, for_key);
    if (for_value >= 0 && for_value < kChunksPerRow) {
        store_vector(shared.value + for_value * kVector,
                     load_fresh_vector(problem.v + kv + for_value * kVector));
    }
    consumer_barrier();  // query, key and value visible to every warp
    if (task.segment == task.num_segments - 1 && for_value >= 0 && for_value < 2 * kChunksPerRow) {
        const int32_t *block_table = args.block_tables + (size_t)task.sequence * args.max_blocks_per_seq;
        int block = block_table[task.position / cache.block_size],
            offset = task.position % cache.block_size;
        int chunk = for_value % kChunksPerRow, is_value = for_value / kChunksPerRow;
        bf16 *tile = cache.data + kv_tile_offset(block, task.kv_head, cache.num_kv_heads, cache.block_size);
        if (is_value) tile += (size_t)cache.block_size * kTileCols;
        const bf16 *row = is_value ? shared.value : shared.key;
        store_vector(tile + tile_offset(offset, chunk), load_vector(row + chunk * kVector));
    }
}

// P of a row and its sum, from its scores: this lane holds keys 8 j + 2 q and + 1.
static __device__ __forceinline__ void softmax_row(uint32_t (&p)[kKeyGroups], float &max, float &sum,
                                                   const float (&scores)[kKeyGroups][2], int num_keys,
                                                   float scale) {
    int q = (int)threadIdx.x % 4;
    float largest = __int_as_float(0xff800000);
#pragma unroll
    for (int j = 0; j < kKeyGroups; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (j * 8 + 2 * q + e < num_keys) largest = fmaxf(largest, scores[j][e]);
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
            pair[e] = j * 8 + 2 * q + e < num_keys ? contract_exp2(exponent) : 0.0f;
        }
        p[j] = pack_bf16(pair[0], pair[1]);
        sum = __fadd_rn(sum, __fadd_rn(low_float(p[j]), high_float(p[j])));
    }
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 2));
}

// One tile by one warp; rows are the heads of the group. Its pieces are numbers `piece`, ...: K, then V.
static __device__ __noinline__ void attend_tile(StepShared &shared, const AttentionTask &task, int tile,
                                                   int piece, int group_size, float scale,
                                                   float (*partial)[kPartialColumns]) {
    const AttentionShared &own = shared.attention;
    int lane = (int)threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    int cached = task.cached_keys(tile), halves = (cached + kPieceKeys - 1) / kPieceKeys;
    int num_keys = min(NUMERICS_TILE, cached + 1);
    int new_key = cached < NUMERICS_TILE ? cached : NUMERICS_TILE;  // no key of the tile if it is full

    uint32_t query[kDimSteps][4] = {};
    if (g < group_size) {
#pragma unroll
        for (int s = 0; s < kDimSteps; ++s) {
            query[s][0] = load_pair(&own.query[g][s * NUMERICS_STEP + 2 * q]);
            query[s][2] = load_pair(&own.query[g][s * NUMERICS_STEP + 2 * q + 8]);
        }
    }
    float scores[kKeyGroups][2];
    uint32_t tile_half = 0;
#pragma unroll
    for (int j = 0; j < kKeyGroups; ++j) {
        constexpr int kGroupsPerHalf = kPieceKeys / 8;
        if (j % kGroupsPerHalf == 0 && j / kGroupsPerHalf < halves)
            tile_half = wait_for_piece(shared, piece + j / kGroupsPerHalf);
        uint32_t keys[2][4] = {};  // columns 0 .. 31 and 32 .. 63 of eight keys
        if (j * 8 < cached) {
            int row = j % kGroupsPerHalf * 8 + lane % 8, chunk = lane / 8;
            load_matrix_x4(keys[0], tile_half + tile_offset(row, chunk) * (int)sizeof(bf16));
            load_matrix_x4(keys[1], tile_half + tile_offset(row, chunk + 4) * (int)sizeof(bf16));
        }
        if (j == new_key / 8 && g == new_key % 8) {
#pragma unroll
            for (int i = 0; i < kDimGroups; ++i) keys[i / 4][i % 4] = load_pair(own.key + i * 8 + 2 * q);
        }
        float acc[4] = {};
#pragma unroll
        for (int s = 0; s < kDimSteps; ++s)
            mma_m16n8k16(acc, query[s], keys[s / 2][s % 2 * 2], keys[s / 2][s % 2 * 2 + 1]);
        scores[j][0] = acc[0];
        scores[j][1] = acc[1];
        if (j % kGroupsPerHalf == kGroupsPerHalf - 1 && j / kGroupsPerHalf < halves) {
            __syncwarp();  // every lane has read the piece before it is filled again
            if (lane == 0) release_piece(shared, piece + j / kGroupsPerHalf);
        }
    }

    uint32_t p[kKeyGroups];
    float max, sum;
    softmax_row(p, max, sum, scores, num_keys, scale);

    float out[kDimGroups][4] = {};
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
        constexpr int kStepsPerHalf = kPieceKeys / NUMERICS_STEP;
        if (s % kStepsPerHalf == 0 && s / kStepsPerHalf < halves)
            tile_half = wait_for_piece(shared, piece + halves + s / kStepsPerHalf);
        const uint32_t weights[4] = {p[2 * s], 0, p[2 * s + 1], 0};
        bool is_read = s * NUMERICS_STEP < cached, is_patched = s == new_key / NUMERICS_STEP;
#pragma unroll
        for (int f = 0; f < kDimGroups; f += 2) {
            uint32_t values[4] = {};  // keys + 0 and + 8 of columns f, then of columns f + 1
            if (is_read) {
                int row = s % kStepsPerHalf * NUMERICS_STEP + lane % 16, chunk = f + lane / 16;
                load_matrix_x4_transposed(values, tile_half + tile_offset(row, chunk) * (int)sizeof(bf16));
            }
            if (is_patched) {
                // This lane holds keys 2 q, 2 q + 1 and 8 further of column 8 (f + i / 2) + g: the new
                // key's value takes its place, keys beyond it count as zero.
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int key = s * NUMERICS_STEP + i % 2 * 8 + 2 * q;
                    uint32_t fresh = own.value[(f + i / 2) * 8 + g];
                    uint32_t low = key < new_key ? values[i] & 0xffffu : key == new_key ? fresh : 0;
                    uint32_t high = key + 1 < new_key ? values[i] >> 16 : key + 1 == new_key ? fresh : 0;
                    values[i] = low | high << 16;
                }
            }
            mma_m16n8k16(out[f], weights, values[0], values[1]);
            mma_m16n8k16(out[f + 1], weights, values[2], values[3]);
        }
        if (s % kStepsPerHalf == kStepsPerHalf - 1 && s / kStepsPerHalf < halves) {
            __syncwarp();  // every lane has read the piece before it is filled again
            if (lane == 0) release_piece(shared, piece + halves + s / kStepsPerHalf);
        }
    }
    if (g >= group_size) return;
#pragma unroll
    for (int f = 0; f < kDimGroups; ++f)
        *reinterpret_cast<float2 *>(&partial[g][f * 8 + 2 * q]) = make_float2(out[f][0], out[f][1]);
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

// The block's tiles into one segment: the result where it is the only one, else its partial result.
static __device__ void fold_tiles(const AttentionShared &shared, const StepArguments &args,
                                  const AttentionTask &task) {
    int group = args.problem.num_heads / args.problem.num_kv_heads;
    for (int i = (int)threadIdx.x; i < group * kTileCols; i += kConsumers) {
        int row = i / kTileCols, column = i % kTileCols;
        const auto &parts = shared.tiles;
        FoldState state = {parts[0][row][kTileCols], parts[0][row][kTileCols + 1], parts[0][row][column]};
        for (int t = 1; t < task.num_tiles; ++t)
            state.fold(parts[t][row][kTileCols], parts[t][row][kTileCols + 1], parts[t][row][column]);
        size_t index = (size_t)task.sequence * args.problem.num_heads + task.kv_head * group + row;
        if (task.num_segments == 1) {
            args.problem.attn[index * kTileCols + column] = state.result();
            continue;
        }
        float *part = args.segments + (index * args.max_segments + task.segment) * kPartialColumns;
        part[column] = state.value;
        if (column == 0) part[kTileCols] = state.max;
        if (column == 1) part[kTileCols + 1] = state.sum;
    }
}

// The last block to finish a sequence and kv head folds its segments.
static __device__ void fold_segments(StepShared &shared, const StepArguments &args,
                                     const AttentionTask &task) {
    int group = args.problem.num_heads / args.problem.num_kv_heads;
    __threadfence();     // this block's segment is out before its ticket
    consumer_barrier();  // every thread's share of it
    if (threadIdx.x == 0) {
        unsigned *ticket = args.tickets + task.sequence * args.problem.num_kv_heads + task.kv_head;
        shared.is_last = atomicAdd(ticket, 1) == (unsigned)task.num_segments - 1;
        if (shared.is_last) *ticket = 0;
    }
    consumer_barrier();  // the verdict visible to every thread
    if (!shared.is_last) return;
    __threadfence();  // the other blocks' segments after their tickets
    for (int i = (int)threadIdx.x; i < group * kTileCols; i += kConsumers) {
        int column = i % kTileCols;
        size_t index =
            (size_t)task.sequence * args.problem.num_heads + task.kv_head * group + i / kTileCols;
        const float *part = args.segments + index * args.max_segments * kPartialColumns;
        FoldState state = {__ldcg(part + kTileCols), __ldcg(part + kTileCols + 1), __ldcg(part + column)};
        for (int s = 1; s < task.num_segments; ++s) {
            part += kPartialColumns;
            state.fold(__ldcg(part + kTileCols), __ldcg(part + kTileCols + 1), __ldcg(part + column));
        }
        args.problem.attn[index * kTileCols + column] = state.result();
    }
}

// The whole phase of one layer; consumers only. `piece` is the number of the block's next piece.
static __device__ void attention_phase(StepShared &shared, const StepArguments &args, const KvLayer &cache,
                                       int &piece) {
    int warp = (int)threadIdx.x / kWarp, group = args.problem.num_heads / args.problem.num_kv_heads;
    for_own_tasks(args, [&](const AttentionTask &task) {
        load_task(shared.attention, args, cache, task);
        for (int i = 0; i < task.num_tiles; ++i) {
            int tile = task.first_tile + i;
            if (warp == i)
                attend_tile(shared, task, tile, piece, group, args.scale, shared.attention.tiles[i]);
            piece += task.pieces_of_tile(tile);
        }
        consumer_barrier();  // the tiles' partial results visible to the threads that fold them
        fold_tiles(shared.attention, args, task);
        if (task.num_segments > 1) fold_segments(shared, args, task);
        consumer_barrier();  // shared memory is read before the next task writes it
    });
}

// The producer's side: K and V of the cached keys of this block's tasks. One warp.
static __device__ void stream_cache(StepShared &shared, const StepArguments &args, const KvLayer &cache,
                                    int &piece) {
    int lane = (int)threadIdx.x % kWarp;
    int copy_keys = min(kPieceKeys, cache.block_size);  // keys that lie together: a copy
    for_own_tasks(args, [&](const AttentionTask &task) {
        const int32_t *block_table = args.block_tables + (size_t)task.sequence * args.max_blocks_per_seq;
        for (int tile = task.first_tile; tile < task.first_tile + task.num_tiles; ++tile) {
            int cached = task.cached_keys(tile), halves = (cached + kPieceKeys - 1) / kPieceKeys;
            for (int i = 0; i < 2 * halves; ++i, ++piece) {
                int is_value = i / halves, first = i % halves * kPieceKeys;
                int keys = min(kPieceKeys, cached - first), slot = slot_of(piece);
                constexpr int kKeyBytes = kTileCols * (int)sizeof(bf16);
                uint32_t full = shared_address(&shared.full[piece % (2 * kSlots)]);
                barrier_wait(shared_address(&shared.empty[slot]), parity_of(piece) ^ 1);
                if (lane == 0) barrier_arrive_expect(full, keys * kKeyBytes);
                __syncwarp();  // the bytes are expected before the first arrive
                int from_key = lane * copy_keys;
                if (from_key < keys) {
                    int key = tile * NUMERICS_TILE + first + from_key;
                    const bf16 *from =
                        cache.data + kv_tile_offset(block_table[key / cache.block_size], task.kv_head,
                                                    cache.num_kv_heads, cache.block_size);
                    from += (size_t)(is_value * cache.block_size + key % cache.block_size) * kTileCols;
                    copy_bulk(shared_address(shared.ring[slot]) + from_key * kKeyBytes, from,
                              min(copy_keys, keys - from_key) * kKeyBytes, full);
                }
            }
        }
    });
}
