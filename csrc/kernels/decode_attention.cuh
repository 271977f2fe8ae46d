// decode_attention.cuh -- the attention phase of the persistent decode kernel: RoPE, cache write, tiles,
// folds.
//
// A task is a run of tiles of one sequence and kv head. The producer streams their cached keys and values
// through the ring like weights; four warps share a tile, each with 32 keys, then with 16 columns of the
// values. The block folds its tiles in order, and where a row has several runs the last block to finish
// folds the row. The step's new key and value do not come through the cache: they are written into the
// ring's last piece.

#pragma once
#include "decode_step.cuh"

constexpr int kFoldColumns = 2;  // a thread folds, of a segment

// Pair `pair` of one head through RoPE, docs/numerics.md section 6.
__device__ __forceinline__ void rotate_pair(bf16 *out, const bf16 *x, const bf16 *table_row, int pair) {
    constexpr int kHalf = kTileCols / 2;
    float low = to_float(__ldcg(x + pair)), high = to_float(__ldcg(x + kHalf + pair));
    float cosine = to_float(table_row[pair]), sine = to_float(table_row[kHalf + pair]);
    out[pair] = to_bf16(__fsub_rn(bf16_product(low, cosine), bf16_product(high, sine)));
    out[kHalf + pair] = to_bf16(__fadd_rn(bf16_product(high, cosine), bf16_product(low, sine)));
}

// Query, new key and new value of a task into shared memory, rotated; the block of the last tile also
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
    bool is_last_run = task.first_tile + task.num_tiles > task.position / NUMERICS_TILE;
    if (is_last_run && for_value >= 0 && for_value < 2 * kChunksPerRow) {
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

// Of the warps that share a tile.
__device__ __forceinline__ void tile_barrier(int place) {
    named_barrier_sync<kTileWarps * kWarp>(kTileWarpsMeet + place);
}

// One tile by kTileWarps warps, at `place` among those at work; rows are the heads of the group. Its pieces
// are numbers `piece`, ...: K, then V.
template <typename Shared>
static __device__ __forceinline__ void attend_tile(Shared &shared, const AttentionTask &task, int tile,
                                                   int place, int piece, int group_size, float scale,
                                                   float (*partial)[kPartialColumns]) {
    constexpr int kWarpSteps = kKeySteps / kTileWarps;  // a warp's share of the scores
    AttentionShared &own = shared.attention;
    int lane = own_thread() % kWarp, g = lane / 4, q = lane % 4;
    int share = own_thread() / kWarp - place * kTileWarps, first_step = share * kWarpSteps;
    int num_keys = task.num_keys(tile), halves = task.halves(tile);
    int num_steps = (num_keys + NUMERICS_STEP - 1) / NUMERICS_STEP, half = first_step / kStepsPerHalf;
    float scores[kWarpSteps][4];
#pragma unroll
    for (int s = 0; s < kWarpSteps; ++s)
#pragma unroll
        for (float &score : scores[s]) score = __int_as_float(0xff800000);  // P is +0
    if (first_step < num_steps) {
        uint32_t query[kDimSteps][2], loaded[4];
        int row = lane % 8 < group_size ? lane % 8 : 0;  // rows beyond repeat the first: never read
#pragma unroll
        for (int s = 0; s < kDimSteps; s += 2) {
            load_matrix_x4(loaded,
                           shared_address(&own.query[row][s * NUMERICS_STEP + lane / 8 * kChunkValues]));
            query[s][0] = loaded[0], query[s][1] = loaded[1];
            query[s + 1][0] = loaded[2], query[s + 1][1] = loaded[3];
        }
        uint32_t rows = wait_for_piece(shared, piece + half);
        if (first_step + kWarpSteps >= num_steps && task.cached_keys(tile) < NUMERICS_TILE) {
            // The tile holds the new key, in its last step.
            int new_row = task.cached_keys(tile) % kPieceKeys;
            patch_piece(slot_of(shared, piece + half), own.key, new_row, new_row + 1);
            wait_for_piece(shared, piece + halves + half);
            patch_piece(slot_of(shared, piece + halves + half), own.value, new_row,
                        (new_row / NUMERICS_STEP + 1) * NUMERICS_STEP);
            fence_async_proxy();  // these writes come before the copies that fill the pieces again
        }
#pragma unroll
        for (int s = 0; s < kWarpSteps; ++s) {
            float low[2], high[2];
            if (first_step + s >= num_steps) break;
            score_keys(low, high, query, rows + (first_step + s) % kStepsPerHalf * kStepBytes);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = (first_step + s) * NUMERICS_STEP + i / 2 * 8 + 2 * q + i % 2;
                if (key < num_keys) scores[s][i] = (i < 2 ? low : high)[i % 2];
            }
        }
    }
    float largest = __int_as_float(0xff800000);
#pragma unroll
    for (int s = 0; s < kWarpSteps; ++s)
#pragma unroll
        for (float score : scores[s]) largest = fmaxf(largest, score);
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
    if (q == 0) own.maxima[place][g][share] = largest;
    tile_barrier(place);  // every warp's maxima, and the new key's value
#pragma unroll
    for (int i = 0; i < kTileWarps; ++i) largest = fmaxf(largest, own.maxima[place][g][i]);
    float max = __fmul_rn(largest, scale);
#pragma unroll
    for (int s = 0; s < kWarpSteps; ++s) {
        bf16 *to = &own.weights[place][g][(first_step + s) * NUMERICS_STEP + 2 * q];
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = contract_exp2(__fmaf_rn(scores[s][i], scale, -max));
        *reinterpret_cast<uint32_t *>(to) = pack_bf16(p[0], p[1]);
        *reinterpret_cast<uint32_t *>(to + 8) = pack_bf16(p[2], p[3]);
    }
    tile_barrier(place);  // P of the whole tile

    float out[2][4] = {};  // columns 16 share and 16 share + 8
    float sum = 0.0f;
    uint32_t rows = 0;
#pragma unroll 2
    for (int s = 0; s < num_steps; ++s) {
        if (s % kStepsPerHalf == 0) rows = wait_for_piece(shared, piece + halves + s / kStepsPerHalf);
        const bf16 *p = &own.weights[place][g][s * NUMERICS_STEP + 2 * q];
        const uint32_t row[4] = {load_pair(p), 0, load_pair(p + 8), 0};
        uint32_t values[4];  // keys + 0 and + 8 of the first eight columns, then of the others
        int key = s % kStepsPerHalf * NUMERICS_STEP + lane % 16;
        load_matrix_x4_transposed(values,
                                  rows + tile_offset(key, 2 * share + lane / 16) * (int)sizeof(bf16));
        mma_m16n8k16(out[0], row, values[0], values[1]);
        mma_m16n8k16(out[1], row, values[2], values[3]);
        sum = __fadd_rn(sum, __fadd_rn(low_float(row[0]), high_float(row[0])));
        sum = __fadd_rn(sum, __fadd_rn(low_float(row[2]), high_float(row[2])));
    }
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 2));
    if (g < group_size) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            *reinterpret_cast<float2 *>(&partial[g][(2 * share + i) * 8 + 2 * q]) =
                make_float2(out[i][0], out[i][1]);
        if (share == 0 && q == 0) partial[g][kTileCols] = max, partial[g][kTileCols + 1] = sum;
    }
    tile_barrier(place);  // every warp has read the pieces
    if (share == 0 && lane < 2 * halves) release_piece(shared, piece + lane);
}

// Some values of a partial result with the maximum and sum of their row.
template <int kValues>
struct FoldState {
    float max, sum, values[kValues];

    __device__ __forceinline__ void fold(const FoldState &next) {
        float largest = fmaxf(max, next.max);
        float keep = contract_exp2(__fsub_rn(max, largest)),
              take = contract_exp2(__fsub_rn(next.max, largest));
        max = largest;
        sum = __fmaf_rn(next.sum, take, __fmul_rn(sum, keep));
#pragma unroll
        for (int i = 0; i < kValues; ++i)
            values[i] = __fmaf_rn(next.values[i], take, __fmul_rn(values[i], keep));
    }
    __device__ __forceinline__ bf16 result(int i) const {
        return to_bf16(__fmul_rn(values[i], __frcp_rn(sum)));
    }
};

// What the block makes of its tiles: the result where they are the whole row, else the row's parts.
static __device__ __forceinline__ void finish_task(const AttentionShared &own, const StepArguments &args,
                                                   const AttentionTask &task) {
    int group = args.problem.num_heads / args.problem.num_kv_heads;
    bool is_row = task.plan.num_runs == 1, is_folded = is_row || task.plan.is_by_segments;
#pragma unroll 1
    for (int i = own_thread(); i < group * kTileCols; i += kConsumers) {
        int row = i / kTileCols, column = i % kTileCols;
        auto tile_state = [&](int tile) -> FoldState<1> {
            const float *from = own.tiles[tile][row];
            return {from[kTileCols], from[kTileCols + 1], {from[column]}};
        };
        auto store_part = [&](int part, const FoldState<1> &state) {
            float *to = args.parts + ((size_t)(task.first_part + part) * group + row) * kPartColumns;
            to[column] = state.values[0];
            if (column == 0) to[kTileCols] = state.max;
            if (column == 1) to[kTileCols + 1] = state.sum;
        };
        auto part_of = [&](int tile) {
            return (task.first_tile + tile) / (task.plan.is_by_segments ? NUMERICS_SEGMENT : 1);
        };
        FoldState<1> state = tile_state(0);
#pragma unroll 1
        for (int t = 1; t < task.num_tiles; ++t) {
            if (is_folded && t != NUMERICS_SEGMENT) {
                state.fold(tile_state(t));
            } else {
                store_part(part_of(t - 1), state);
                state = tile_state(t);
            }
        }
        size_t head = (size_t)task.sequence * args.problem.num_heads + task.kv_head * group + row;
        if (is_row) {
            args.problem.attn[head * kTileCols + column] = state.result(0);
        } else {
            store_part(part_of(task.num_tiles - 1), state);
        }
    }
}

// Segments first .. first + count - 1 of a row from its parts, each head's, into own.folds.
static __device__ __forceinline__ void fold_segments(AttentionShared &own, const StepArguments &args,
                                                     const AttentionTask &task, int first, int count,
                                                     int group) {
    constexpr int kThreadsPerRow = kTileCols / kFoldColumns;
#pragma unroll 1
    for (int i = own_thread(); i < count * group * kThreadsPerRow; i += kConsumers) {
        int segment_row = i / kThreadsPerRow, column = i % kThreadsPerRow * kFoldColumns;
        int segment = segment_row / group, first_part = (first + segment) * NUMERICS_SEGMENT;
        int num_parts = min(NUMERICS_SEGMENT, task.plan.num_parts - first_part);
        const float *from =
            args.parts +
            ((size_t)(task.first_part + first_part) * group + segment_row - segment * group) * kPartColumns;
        float2 values[NUMERICS_SEGMENT];
        float2 max_and_sum[NUMERICS_SEGMENT];
#pragma unroll
        for (int t = 0; t < NUMERICS_SEGMENT; ++t) {
            if (t >= num_parts) break;
            values[t] = __ldcg(reinterpret_cast<const float2 *>(from + column));
            max_and_sum[t] = __ldcg(reinterpret_cast<const float2 *>(from + kTileCols));
            from += group * kPartColumns;
        }
        auto part = [&](int t) -> FoldState<kFoldColumns> {
            return {max_and_sum[t].x, max_and_sum[t].y, {values[t].x, values[t].y}};
        };
        FoldState<kFoldColumns> state = part(0);
#pragma unroll
        for (int t = 1; t < NUMERICS_SEGMENT; ++t)
            if (t < num_parts) state.fold(part(t));
        float *to = own.folds[segment_row];
        *reinterpret_cast<float2 *>(to + column) = make_float2(state.values[0], state.values[1]);
        if (column == 0) to[kTileCols] = state.max, to[kTileCols + 1] = state.sum;
    }
}

// The same where each part is a segment's fold already.
static __device__ __forceinline__ void copy_segments(AttentionShared &own, const StepArguments &args,
                                                     const AttentionTask &task, int first, int count,
                                                     int group) {
    constexpr int kCopies = kPartColumns * (int)sizeof(float) / 16;  // of a head's part
    const float *from = args.parts + (size_t)(task.first_part + first) * group * kPartColumns;
    uint32_t to = shared_address(own.folds);
#pragma unroll 1
    for (int i = own_thread(); i < count * group * kCopies; i += kConsumers)
        copy_async_16(to + i * 16, from + i * 4, 16);
    copy_async_commit();
    copy_async_wait<0>();
}

// The last block to finish a row folds its parts: tiles into segments, segments into the row.
template <typename Shared>
static __device__ __forceinline__ void finish_row(Shared &shared, const StepArguments &args,
                                                  const AttentionTask &task) {
    int group = args.problem.num_heads / args.problem.num_kv_heads;
    consumer_barrier();  // every thread's share of this block's parts
    if (own_thread() == 0) {
        unsigned *ticket = args.tickets + task.sequence * args.problem.num_kv_heads + task.kv_head;
        // This block's parts are out before its ticket, the other blocks' are read after theirs.
        shared.is_last = add_acquire_release(ticket, 1) == (unsigned)task.plan.num_runs - 1;
        if (shared.is_last) *ticket = 0;
    }
    consumer_barrier();  // the verdict visible to every thread
    if (!shared.is_last) return;
    int per_segment = task.plan.is_by_segments ? 1 : NUMERICS_SEGMENT;
    int num_segments = (task.plan.num_parts + per_segment - 1) / per_segment;
    int at_once = kFoldRows / group;  // segments
    int column = own_thread() % (kTileCols / 2) * 2, own_row = own_thread() / (kTileCols / 2);
    FoldState<2> row = {};
#pragma unroll 1
    for (int first = 0; first < num_segments; first += at_once) {
        int count = min(at_once, num_segments - first);
        if (task.plan.is_by_segments) {
            copy_segments(shared.attention, args, task, first, count, group);
        } else {
            fold_segments(shared.attention, args, task, first, count, group);
        }
        consumer_barrier();  // the segments visible to the threads that fold them
        if (own_row < group) {
#pragma unroll 1
            for (int s = 0; s < count; ++s) {
                const float *from = shared.attention.folds[s * group + own_row];
                FoldState<2> segment = {
                    from[kTileCols], from[kTileCols + 1], {from[column], from[column + 1]}};
                if (first + s == 0) {
                    row = segment;
                } else {
                    row.fold(segment);
                }
            }
        }
        if (first + at_once < num_segments) consumer_barrier();  // they are read
    }
    if (own_row >= group) return;
    size_t head = (size_t)task.sequence * args.problem.num_heads + task.kv_head * group + own_row;
    *reinterpret_cast<uint32_t *>(args.problem.attn + head * kTileCols + column) =
        row.result(0) | (uint32_t)row.result(1) << 16;
}

// The whole phase of one layer; consumers only. `piece` is the number of the block's next piece.
template <typename Shared>
static __device__ __forceinline__ void attention_phase(Shared &shared, const StepArguments &args,
                                                       const KvLayer &cache, int &piece) {
    int warp = own_thread() / kWarp, group = args.problem.num_heads / args.problem.num_kv_heads;
    for_own_tasks(shared, args, [&](const AttentionTask &task) {
        load_task(shared.attention, args, cache, task, shared.rope[task.sequence]);
        int place = warp / kTileWarps;
        constexpr int kPiecesPerTile = 2 * NUMERICS_TILE / kPieceKeys;  // of all but the last
#pragma unroll 1
        for (int t = place; t < task.num_tiles; t += kTilesAtOnce)
            attend_tile(shared, task, task.first_tile + t, place, piece + t * kPiecesPerTile, group,
                        args.scale, shared.attention.tiles[t]);
        int last = task.num_tiles - 1;
        piece += last * kPiecesPerTile + 2 * task.halves(task.first_tile + last);
        consumer_barrier();  // the tiles' results visible to the threads that fold them
        finish_task(shared.attention, args, task);
        if (task.plan.num_runs > 1) finish_row(shared, args, task);
        consumer_barrier();  // shared memory is read before the next task writes it
    });
}
