// decode_attention.cuh -- the attention phase of the persistent decode kernel: RoPE, cache write, tiles,
// folds.
//
// A task is one segment (1024 keys) of one sequence and kv head. The producer streams the cached keys and
// values of a block's tasks through the ring like weights; eight warps take a tile each, the block folds
// its tiles in order, and where a row has several segments the last block to finish folds those, in order.
// The step's new key and value do not come through the cache: they are written into the ring's last piece.

#pragma once
#include "decode_step.cuh"

constexpr int kFoldBatch = 4;  // segments loaded together

// Pair `pair` of one head through RoPE, docs/numerics.md section 6.
__device__ __forceinline__ void rotate_pair(bf16 *out, const bf16 *x, const bf16 *table_row, int pair) {
    constexpr int kHalf = kTileCols / 2;
    float low = to_float(__ldcg(x + pair)), high = to_float(__ldcg(x + kHalf + pair));
    float cosine = to_float(table_row[pair]), sine = to_float(table_row[kHalf + pair]);
    out[pair] = to_bf16(__fsub_rn(bf16_product(low, cosine), bf16_product(high, sine)));
    out[kHalf + pair] = to_bf16(__fadd_rn(bf16_product(high, cosine), bf16_product(low, sine)));
}

// Query, new key and new value of a task into shared memory, rotated; the block of the last segment also
// writes the cache. The key and the value are for the last two warps, which take no tile.
static __device__ __forceinline__ void load_task(AttentionShared &own, const StepArguments &args,
                                                 const KvLayer &cache, const AttentionTask &task,
                                                 const bf16 *table_row) {
    constexpr int kHalf = kTileCols / 2;
    const DecodeProblem &problem = args.problem;
    int group = problem.num_heads / problem.num_kv_heads, thread = own_thread();
    size_t kv = ((size_t)task.sequence * problem.num_kv_heads + task.kv_head) * kTileCols;
    int for_key = thread - (kConsumers - kWarp), for_value = thread - (kConsumers - 2 * kWarp);
    if (thread < group * kHalf) {
        size_t row = (size_t)task.sequence * problem.num_heads + task.kv_head * group + thread / kHalf;
        rotate_pair(own.query[thread / kHalf], problem.q + row * kTileCols, table_row, thread % kHalf);
    }
    if (for_key >= 0) rotate_pair(own.key, problem.k + kv, table_row, for_key);
    if (for_value >= 0 && for_value < kChunksPerRow)
        store_vector(own.value + for_value * kVector,
                     load_fresh_vector(problem.v + kv + for_value * kVector));
    consumer_barrier();  // query, key and value visible to every warp
    if (task.segment == task.num_segments - 1 && for_value >= 0 && for_value < 2 * kChunksPerRow) {
        const int32_t *block_table = args.block_tables + (size_t)task.sequence * args.max_blocks_per_seq;
        int index = task.position / cache.block_size, offset = task.position - index * cache.block_size;
        int chunk = for_value % kChunksPerRow, is_value = for_value / kChunksPerRow;
        bf16 *tile = cache.data +
                     kv_tile_offset(block_table[index], task.kv_head, cache.num_kv_heads, cache.block_size);
        if (is_value) tile += (size_t)cache.block_size * kTileCols;
        const bf16 *row = is_value ? own.value : own.key;
        store_vector(tile + tile_offset(offset, chunk), load_vector(row + chunk * kVector));
    }
}

// Writes the new key's row, or value's, into its piece at row `row`, and zero into the rows up to `end`.
static __device__ __forceinline__ void patch_piece(unsigned char *slot, const bf16 *fresh, int row,
                                                   int end) {
    int lane = own_thread() % kWarp;
    bf16 *piece = reinterpret_cast<bf16 *>(slot);
#pragma unroll 1
    for (int i = lane; i < (end - row) * kChunksPerRow; i += kWarp) {
        int chunk = i % kChunksPerRow, below = i / kChunksPerRow;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (below == 0) value = load_vector(fresh + chunk * kVector);
        store_vector(piece + tile_offset(row + below, chunk), value);
    }
    __syncwarp();  // the row is in before any lane reads it
}

// Every lane has read the piece, and what it wrote into it comes before the copy that fills it again.
static __device__ __forceinline__ void give_back_piece(StepShared &shared, int piece, bool is_patched) {
    if (is_patched) fence_async_proxy();
    __syncwarp();
    if (own_thread() % kWarp == 0) release_piece(shared, piece);
}

// One tile by one warp; rows are the heads of the group. Its pieces are numbers `piece`, ...: K, then V.
static __device__ __forceinline__ void attend_tile(StepShared &shared, const AttentionTask &task, int tile,
                                                   int piece, int group_size, float scale,
                                                   float (*partial)[kPartialColumns]) {
    const AttentionShared &own = shared.attention;
    int lane = own_thread() % kWarp, g = lane / 4, q = lane % 4;
    int cached = task.cached_keys(tile), num_keys = task.num_keys(tile), halves = task.halves(tile);
    int num_steps = (num_keys + NUMERICS_STEP - 1) / NUMERICS_STEP;
    bool is_patched = cached < NUMERICS_TILE;  // the tile holds the new key, in its last half
    int new_row = cached % kPieceKeys;
    int end_row = (new_row / NUMERICS_STEP + 1) * NUMERICS_STEP;

    uint32_t query[kDimSteps][2];
#pragma unroll
    for (int s = 0; s < kDimSteps; ++s) {
        int row = g < group_size ? g : 0;  // rows beyond repeat the first: their results are never read
        query[s][0] = load_pair(&own.query[row][s * NUMERICS_STEP + 2 * q]);
        query[s][1] = load_pair(&own.query[row][s * NUMERICS_STEP + 2 * q + 8]);
    }
    float scores[kKeyGroups][2];
    uint32_t half_rows = 0;
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
        int half = s / kStepsPerHalf;
        if (s % kStepsPerHalf == 0 && half < halves) {
            half_rows = wait_for_piece(shared, piece + half);
            if (is_patched && half == halves - 1)
                patch_piece(shared.ring[slot_of(piece + half)], own.key, new_row, new_row + 1);
        }
        if (s < num_steps)
            score_keys(scores[2 * s], scores[2 * s + 1], query, half_rows + s % kStepsPerHalf * kStepBytes);
        if ((s + 1) * NUMERICS_STEP > num_keys) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = s * NUMERICS_STEP + i / 2 * 8 + 2 * q + i % 2;
                if (key >= num_keys) scores[2 * s + i / 2][i % 2] = __int_as_float(0xff800000);  // P is +0
            }
        }
        if (s % kStepsPerHalf == kStepsPerHalf - 1 && half < halves)
            give_back_piece(shared, piece + half, is_patched);
    }
    piece += halves;

    uint32_t p[kKeyGroups];
    float max, sum;
    softmax_row(p, max, sum, scores, scale);

    float out[kDimGroups][4] = {};
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
        int half = s / kStepsPerHalf;
        if (s % kStepsPerHalf == 0 && half < halves) {
            half_rows = wait_for_piece(shared, piece + half);
            if (is_patched && half == halves - 1)
                patch_piece(shared.ring[slot_of(piece + half)], own.value, new_row, end_row);
        }
        if (s < num_steps) {
            weigh_values(out, p[2 * s], p[2 * s + 1], half_rows + s % kStepsPerHalf * kStepBytes);
        }
        if (s % kStepsPerHalf == kStepsPerHalf - 1 && half < halves)
            give_back_piece(shared, piece + half, is_patched);
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

    __device__ void fold(const FoldState &next) {
        float largest = fmaxf(max, next.max);
        float keep = contract_exp2(__fsub_rn(max, largest)),
              take = contract_exp2(__fsub_rn(next.max, largest));
        max = largest;
        sum = __fmaf_rn(next.sum, take, __fmul_rn(sum, keep));
        value = __fmaf_rn(next.value, take, __fmul_rn(value, keep));
    }
    __device__ bf16 result() const { return to_bf16(__fmul_rn(value, __frcp_rn(sum))); }
};

// The block's tiles into one segment: the result where it is the only one, else its partial result.
static __device__ __forceinline__ void fold_tiles(const AttentionShared &own, const StepArguments &args,
                                                  const AttentionTask &task) {
    int group = args.problem.num_heads / args.problem.num_kv_heads;
#pragma unroll 1
    for (int i = own_thread(); i < group * kTileCols; i += kConsumers) {
        int row = i / kTileCols, column = i % kTileCols;
        auto part = [&](int tile) -> FoldState {
            const float *from = own.tiles[tile][row];
            return {from[kTileCols], from[kTileCols + 1], from[column]};
        };
        FoldState state = part(0);
#pragma unroll 1
        for (int t = 1; t < task.num_tiles; ++t) state.fold(part(t));
        size_t index = (size_t)task.sequence * args.problem.num_heads + task.kv_head * group + row;
        if (task.num_segments == 1) {
            args.problem.attn[index * kTileCols + column] = state.result();
            continue;
        }
        float *to = args.segments + (index * args.max_segments + task.segment) * kPartialColumns;
        to[column] = state.value;
        if (column == 0) to[kTileCols] = state.max;
        if (column == 1) to[kTileCols + 1] = state.sum;
    }
}

// The last block to finish a sequence and kv head folds its segments.
static __device__ __forceinline__ void fold_segments(StepShared &shared, const StepArguments &args,
                                                     const AttentionTask &task) {
    int group = args.problem.num_heads / args.problem.num_kv_heads;
    consumer_barrier();  // every thread's share of this block's segment
    if (own_thread() == 0) {
        fence_gpu();  // it is out before its ticket
        unsigned *ticket = args.tickets + task.sequence * args.problem.num_kv_heads + task.kv_head;
        shared.is_last = atomicAdd(ticket, 1) == (unsigned)task.num_segments - 1;
        if (shared.is_last) *ticket = 0;
        fence_gpu();  // the other blocks' segments after their tickets
    }
    consumer_barrier();  // the verdict visible to every thread
    if (!shared.is_last) return;
#pragma unroll 1
    for (int i = own_thread(); i < group * kTileCols; i += kConsumers) {
        int column = i % kTileCols;
        size_t index =
            (size_t)task.sequence * args.problem.num_heads + task.kv_head * group + i / kTileCols;
        const float *segments = args.segments + index * args.max_segments * kPartialColumns;
        FoldState state = {};
#pragma unroll 1
        for (int first = 0; first < task.num_segments; first += kFoldBatch) {
            FoldState parts[kFoldBatch];
#pragma unroll
            for (int s = 0; s < kFoldBatch; ++s) {
                const float *from = segments + min(first + s, task.num_segments - 1) * kPartialColumns;
                parts[s] = {__ldcg(from + kTileCols), __ldcg(from + kTileCols + 1), __ldcg(from + column)};
            }
            if (first == 0) state = parts[0];
#pragma unroll
            for (int s = 0; s < kFoldBatch; ++s)
                if (first + s > 0 && first + s < task.num_segments) state.fold(parts[s]);
        }
        args.problem.attn[index * kTileCols + column] = state.result();
    }
}

// The whole phase of one layer; consumers only. `piece` is the number of the block's next piece.
static __device__ __forceinline__ void attention_phase(StepShared &shared, const StepArguments &args,
                                                       const KvLayer &cache, int &piece) {
    int warp = own_thread() / kWarp, group = args.problem.num_heads / args.problem.num_kv_heads;
    for_own_tasks(shared, args, [&](const AttentionTask &task) {
        load_task(shared.attention, args, cache, task, shared.rope[task.sequence]);
        constexpr int kPiecesPerTile = 2 * NUMERICS_TILE / kPieceKeys;  // of all but the last
        if (warp < task.num_tiles)
            attend_tile(shared, task, task.first_tile + warp, piece + warp * kPiecesPerTile, group,
                        args.scale, shared.attention.tiles[warp]);
        piece += task.num_pieces();
        consumer_barrier();  // the tiles' partial results visible to the threads that fold them
        fold_tiles(shared.attention, args, task);
        if (task.num_segments > 1) fold_segments(shared, args, task);
        consumer_barrier();  // shared memory is read before the next task writes it
    });
}
