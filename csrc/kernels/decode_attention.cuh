// decode_attention.cuh -- the attention phase of the persistent decode kernel: RoPE, cache write, tiles,
// folds.
//
// A task is a run of tiles of one sequence and kv head. The producer streams their cached keys and values
// through the ring like weights; four warps share a tile, each with 32 keys, then with 16 columns of the
// values. The block folds its tiles in order, and where a row has several runs the last block to finish
// folds the row. The step's new key and value do not come through the cache: they are written into the
// ring's last piece.

#pragma once
#include "decode_fold.cuh"

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
    int own_tiles = task.own_tiles;
    bool has_new = own_tiles > 0 && task.tile_of(own_tiles - 1) == task.position / NUMERICS_TILE;
    if (has_new && for_value >= 0 && for_value < 2 * kChunksPerRow) {
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

// Two values of a tile's result to the block that folds it, once it has folded the task before.
template <typename Shared>
static __device__ __forceinline__ void give_tile(Shared &shared, const AttentionTask &task, float *to,
                                                 float2 pair, int num_attended) {
    if (Shared::kCluster == 1 || task.rank == 0) {
        *reinterpret_cast<float2 *>(to) = pair;
    } else {
        if (num_attended > 0) barrier_wait(shared_address(&shared.tiles_folded), (num_attended & 1) ^ 1);
        store_async_8(map_shared(shared_address(to), 0), pair,
                      map_shared(shared_address(&shared.tiles_here), 0));
    }
}

// One tile by kTileWarps warps, at `place` among those at work; rows are the heads of the group. Its pieces
// are numbers `piece`, ...: K, then V.
template <typename Shared>
static __device__ __forceinline__ void attend_tile(Shared &shared, const AttentionTask &task, int tile,
                                                   int place, int piece, int group_size, float scale,
                                                   int num_attended) {
    constexpr int kWarpSteps = kKeySteps / kTileWarps;  // a warp's share of the scores
    AttentionShared &own = shared.attention;
    float (*partial)[kPartialColumns] = own.tiles[tile - task.first_tile];
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
        score_keys(scores, query, rows + first_step % kStepsPerHalf * kStepBytes);
#pragma unroll
        for (int i = 0; i < 4 * kWarpSteps; ++i) {
            int key = (first_step + i / 4) * NUMERICS_STEP + i % 4 / 2 * 8 + 2 * q + i % 2;
            if (key >= num_keys) scores[i / 4][i % 4] = __int_as_float(0xff800000);
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
#pragma unroll 1
    for (int half = 0; half < halves; ++half) {
        uint32_t rows = wait_for_piece(shared, piece + halves + half);
        uint32_t weights[kStepsPerHalf][2], values[kStepsPerHalf][4];
#pragma unroll
        for (int s = 0; s < kStepsPerHalf; ++s) {
            const bf16 *p = &own.weights[place][g][(half * kStepsPerHalf + s) * NUMERICS_STEP + 2 * q];
            weights[s][0] = load_pair(p), weights[s][1] = load_pair(p + 8);
            // Keys + 0 and + 8 of the first eight columns, then of the others.
            int key = s * NUMERICS_STEP + lane % 16;
            load_matrix_x4_transposed(values[s],
                                      rows + tile_offset(key, 2 * share + lane / 16) * (int)sizeof(bf16));
        }
#pragma unroll
        for (int s = 0; s < kStepsPerHalf; ++s) {
            if (half * kStepsPerHalf + s >= num_steps) break;
            const uint32_t row[4] = {weights[s][0], 0, weights[s][1], 0};
            mma_m16n8k16(out[0], row, values[s][0], values[s][1]);
            mma_m16n8k16(out[1], row, values[s][2], values[s][3]);
            sum = __fadd_rn(sum, __fadd_rn(low_float(row[0]), high_float(row[0])));
            sum = __fadd_rn(sum, __fadd_rn(low_float(row[2]), high_float(row[2])));
        }
    }
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 2));
    if (g < group_size) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            give_tile(shared, task, &partial[g][(2 * share + i) * 8 + 2 * q],
                      make_float2(out[i][0], out[i][1]), num_attended);
        if (share == 0 && q == 0)
            give_tile(shared, task, &partial[g][kTileCols], make_float2(max, sum), num_attended);
    }
    tile_barrier(place);  // every warp has read the pieces
    if (share == 0 && lane < 2 * halves) release_piece(shared, piece + lane);
}

// The whole phase of one layer; consumers only. `piece` is the number of the block's next piece,
// `num_attended` its cluster's tasks so far.
template <typename Shared>
static __device__ __forceinline__ void attention_phase(Shared &shared, const StepArguments &args,
                                                       const KvLayer &cache, int &piece,
                                                       int &num_attended) {
    int warp = own_thread() / kWarp, group = args.problem.num_heads / args.problem.num_kv_heads;
    for_own_tasks(shared, args, shared.first_task, [&](const AttentionTask &task) {
        int own_tiles = task.own_tiles, rank = task.rank;
        uint32_t here = shared_address(&shared.tiles_here);
        if (Shared::kCluster > 1 && rank == 0 && own_thread() == 0)
            barrier_arrive_expect(
                here, (task.num_tiles - own_tiles) * group * kPartialColumns * (int)sizeof(float));
        load_task(shared.attention, args, cache, task, shared.rope[task.sequence]);
        int place = warp / kTileWarps;
        constexpr int kPiecesPerTile = 2 * NUMERICS_TILE / kPieceKeys;  // of all but the last
#pragma unroll 1
        for (int t = place; t < own_tiles; t += kTilesAtOnce)
            attend_tile(shared, task, task.tile_of(t), place, piece + t * kPiecesPerTile, group, args.scale,
                        num_attended);
        int last = own_tiles - 1;
        if (own_tiles > 0) piece += last * kPiecesPerTile + 2 * task.halves(task.tile_of(last));
        consumer_barrier();  // the tiles' results visible to the threads that fold them
        if (rank == 0) {
            if (Shared::kCluster > 1) barrier_wait(here, num_attended & 1);
            finish_task(shared.attention, args, task);
            if (task.plan.num_runs > 1) finish_row(shared, args, task);
            consumer_barrier();  // shared memory is read before the next task writes it
            int lane = own_thread();
            if (lane > 0 && lane < task.team)
                barrier_arrive_remote(map_shared(shared_address(&shared.tiles_folded), lane));
        }
        ++num_attended;
    });
}
