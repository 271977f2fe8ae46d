// decode_linear.cuh -- the consumers' side of the linear layers in the persistent decode kernel.
//
// A warp takes one chunk of one unit out of the ring into its registers, then multiplies: eight weight rows
// are the columns of mma.m16n8k16, the tokens its rows. Chunk sums meet in the shared memory of the block whose
// unit it is and are added there in order, docs/numerics.md section 2.

#pragma once
#include "decode_step.cuh"
#include "silu.cuh"

constexpr int kStepsPerTile = kTileCols / NUMERICS_STEP;
constexpr int kChunkTiles = NUMERICS_CHUNK / kTileCols;

// A piece of weights in a warp's registers, from where its chain takes them: the slot is free for the next
// piece before the activations are there. Of each k tile this lane has the weights of four steps.
struct HeldPiece {
    uint32_t weights[kChunkTiles][2][4];

    // Waits for the piece, takes it out of the ring and gives its slot back.
    template <typename Shared>
    __device__ __forceinline__ void take(Shared &shared, int piece, int num_tiles) {
        int lane = own_thread() % kWarp;
        uint32_t strip = wait_for_piece(shared, piece);
        uint32_t low = strip + tile_offset(lane % 8, lane / 8) * (int)sizeof(bf16);
        uint32_t high = strip + tile_offset(lane % 8, lane / 8 + 4) * (int)sizeof(bf16);
#pragma unroll
        for (int tile = 0; tile < kChunkTiles; ++tile) {
            if (tile >= num_tiles) break;
            load_matrix_x4(weights[tile][0], low + tile * kStripBytes);
            load_matrix_x4(weights[tile][1], high + tile * kStripBytes);
        }
        __syncwarp();  // every lane has read the piece before it is filled again
        if (lane == 0) release_piece(shared, piece);
    }

    // Its chain, 8 weight rows x up to 8 tokens: this lane's two sums, of token lane / 4. `tokens` is the
    // address at which this lane reads the chunk's first k tile: its first 32 columns' 16 bytes lane / 8, of
    // token lane % 8.
    __device__ __forceinline__ float2 multiply(uint32_t tokens, int num_tiles) const {
        constexpr int kTileBytes = kTileCols * (int)sizeof(bf16);
        float acc[4] = {};
#pragma unroll
        for (int tile = 0; tile < kChunkTiles; ++tile) {
            if (tile >= num_tiles) break;
            uint32_t x[2][4];
            load_matrix_x4(x[0], tokens + tile * kTileBytes);
            load_matrix_x4(x[1], (tokens ^ kTileBytes / 2) + tile * kTileBytes);  // 32 columns further
#pragma unroll
            for (int s = 0; s < kStepsPerTile; ++s) {
                const uint32_t rows[4] = {x[s / 2][s % 2 * 2], 0, x[s / 2][s % 2 * 2 + 1], 0};
                mma_m16n8k16(acc, rows, weights[tile][s / 2][s % 2 * 2],
                             weights[tile][s / 2][s % 2 * 2 + 1]);
            }
        }
        return make_float2(acc[0], acc[1]);
    }
};

// A warp's first task of a group of chunks, by the number of the group's first piece in the whole stream.
__device__ __forceinline__ int first_task(int piece) {
    return (own_thread() / kWarp - piece % kConsumerWarps + kConsumerWarps) % kConsumerWarps;
}

__device__ __forceinline__ int tiles_of_chunk(const PhaseOrder &order, int chunk) {
    return chunk_width(order.cols, chunk) / kTileCols;
}

// Takes the warp's first piece of a phase, if it has one, whose first weights are piece `piece`.
template <typename Shared>
static __device__ __forceinline__ void hold_first(Shared &shared, HeldPiece &held, int piece, int phase) {
    const PhaseOrder &order = shared.orders[phase];
    int task = first_task(piece), chunks = order.chunks_per_group;
    int num_tasks = min(order.units_per_round, order.own_units) * order.parts * Shared::kCluster * chunks;
    if (task < num_tasks)
        held.take(shared, piece + task, tiles_of_chunk(order, chunk_of<Shared>(task % chunks)));
}

// `count` of the block's chunks of the tokens' rows, from its chunk `first` on, into shared.input. Of several
// tokens by bulk copies, one a chunk.
template <typename Shared>
static __device__ __forceinline__ void stage_input(Shared &shared, const bf16 *rows,
                                                   const PhaseOrder &order, int first, int count,
                                                   int num_tokens, int &num_staged) {
    uint32_t to = shared_address(shared.input);
    if (Shared::kTokens == 1) {
        for (int column = own_thread() * kVector; column < count * NUMERICS_CHUNK;
             column += kConsumers * kVector) {
            int from = first * NUMERICS_CHUNK + column;
            if (from < order.cols) copy_async_16(to + column * (int)sizeof(bf16), rows + from, 16);
        }
        copy_async_commit();
        copy_async_wait<0>();
        consumer_barrier();  // the rows visible to every warp
        return;
    }
    uint32_t here = shared_address(&shared.input_here);
    int lane = own_thread();
    if (lane < kWarp) {
        int last_width = chunk_width(order.cols, chunk_of<Shared>(first + count - 1));
        if (lane == 0)
            barrier_arrive_expect(
                here, ((count - 1) * NUMERICS_CHUNK + last_width) * num_tokens * (int)sizeof(bf16));
        __syncwarp();  // the bytes are expected before the first arrive
        // What was there is read; what is asked for was written before the grid met.
        fence_async_proxy();
        fence_async_proxy_global();
        if (lane < count) {
            int chunk = chunk_of<Shared>(first + lane);
            copy_bulk(to + lane * num_tokens * NUMERICS_CHUNK * (int)sizeof(bf16),
                      rows + (size_t)chunk * num_tokens * NUMERICS_CHUNK,
                      chunk_width(order.cols, chunk) * num_tokens * (int)sizeof(bf16), here);
        }
    }
    barrier_wait(here, num_staged & 1);
    ++num_staged;
}

// One output's chunk sums, added in order; kAtOnce of them are loaded together.
template <int kOutputs>
static __device__ __forceinline__ float add_chunks(const float *sums, int num_chunks) {
    constexpr int kAtOnce = 4;
    float sum = 0.0f;
#pragma unroll 1
    for (int first = 0; first < num_chunks; first += kAtOnce) {
        float next[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (first + i < num_chunks) next[i] = sums[(first + i) * kOutputs];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (first + i < num_chunks) sum = first + i == 0 ? next[i] : __fadd_rn(sum, next[i]);
    }
    return sum;
}

// The exchange of a round's chunk sums within the cluster. `entries` of them come from the other blocks.
template <typename Shared>
static __device__ __forceinline__ void begin_round(Shared &shared, int entries) {
    if (Shared::kCluster > 1 && own_thread() == 0)
        barrier_arrive_expect(shared_address(&shared.sums_here),
                              entries * Shared::kOutputs * (int)sizeof(float));
}

// This lane's two sums of a chunk into entry `entry` of the block `owner`. They may overwrite the sums of
// the round before: not until those are added.
template <typename Shared>
static __device__ __forceinline__ void give_sums(Shared &shared, int entry, int owner, int round,
                                                 float2 pair) {
    int lane = own_thread() % kWarp;
    float *to = &shared.sums[entry][lane / 4 * kUnitRows + lane % 4 * 2];
    if (owner == own_rank<Shared>()) {
        *reinterpret_cast<float2 *>(to) = pair;
    } else {
        if (round > 0) barrier_wait(shared_address(&shared.sums_added), (round & 1) ^ 1);
        store_async_8(map_shared(shared_address(to), owner), pair,
                      map_shared(shared_address(&shared.sums_here), owner));
    }
}

// This warp has added its share of the round's sums.
template <typename Shared>
static __device__ __forceinline__ void end_round(Shared &shared) {
    if (Shared::kCluster == 1) return;
    int lane = own_thread() % kWarp;
    __syncwarp();  // every lane has read its sums
    if (lane < Shared::kCluster && lane != own_rank<Shared>())
        barrier_arrive_remote(map_shared(shared_address(&shared.sums_added), lane));
}

// The block's pieces of one phase, of which the warps hold the first already. `rows` [num_tokens, cols] are
// other blocks' results; null if shared.input holds the normalised rows already. epilogue(token, row, value,
// second) gets each output once, `second` being the paired matrix's value; thread i gets outputs i,
// i + kConsumers, .. of each round.
template <typename Shared, typename Epilogue>
static __device__ __forceinline__ void compute_phase(Shared &shared, HeldPiece &held, int &piece,
                                                     int &round, int &num_staged, int phase,
                                                     const bf16 *rows, int num_tokens, Epilogue epilogue) {
    int lane = own_thread() % kWarp;
    constexpr int kOutputs = Shared::kOutputs, kCluster = Shared::kCluster;
    const PhaseOrder order = shared.orders[phase];
    int per_unit = order.parts * order.num_chunks, row_parts = order.parts * kCluster;
    // Rows beyond the last token repeat the first: their results are never read.
    int token_row = lane % 8 < num_tokens ? lane % 8 : 0;
    uint32_t input = shared_address(shared.input) + (lane / 8 ^ token_row) * kVector * (int)sizeof(bf16);
    bool is_awaited = phase == kPhaseDown;  // the rest of the input
#pragma unroll 1
    for (int first_unit = 0; first_unit < order.own_units; first_unit += order.units_per_round) {
        int num_units = min(order.units_per_round, order.own_units - first_unit);
        begin_round(shared, num_units * order.parts * (order.num_chunks - order.own_chunks));
#pragma unroll 1
        for (int first_chunk = 0; first_chunk < order.own_chunks; first_chunk += order.chunks_per_group) {
            int chunks = min(order.chunks_per_group, order.own_chunks - first_chunk);
            // Which warp takes which piece follows from the piece's number in the whole stream.
            int task = first_task(piece), row = 0, chunk = task;  // a row of pieces: a unit's part
            int num_tasks = num_units * row_parts * chunks;
            bool is_held = first_unit + first_chunk == 0;  // the warp's first piece
            int last_chunk = chunk_of<Shared>(first_chunk + chunks - 1);
            if (is_awaited && min(order.cols, (last_chunk + 1) * NUMERICS_CHUNK) > order.early_cols) {
                if (!is_held && task < num_tasks)
                    held.take(shared, piece + task,
                              tiles_of_chunk(order, chunk_of<Shared>(first_chunk + task % chunks)));
                is_held = true;
                finish_grid_barrier();
                is_awaited = false;
            }
            if (rows != nullptr && (first_unit == 0 || chunks < order.own_chunks)) {
                if (first_unit + first_chunk > 0) consumer_barrier();  // the previous columns are read
                stage_input(shared, rows, order, first_chunk, chunks, num_tokens, num_staged);
            }
#pragma unroll 1
            for (; task < num_tasks; task += kConsumerWarps, chunk += kConsumerWarps) {
#pragma unroll 1
                for (; chunk >= chunks; chunk -= chunks) ++row;
                int place = chunk_of<Shared>(first_chunk + chunk), tiles = tiles_of_chunk(order, place);
                if (!is_held) held.take(shared, piece + task, tiles);
                is_held = false;
                int values = chunk * num_tokens * NUMERICS_CHUNK + token_row * tiles * kTileCols;
                float2 pair = held.multiply(input + values * (int)sizeof(bf16), tiles);
                if (lane / 4 < Shared::kTokens)
                    give_sums(shared, row / kCluster * order.num_chunks + place, row % kCluster, round,
                              pair);
            }
            piece += num_tasks;
        }
        consumer_barrier();  // the round's chunk sums visible to the threads that add them
        if (kCluster > 1) barrier_wait(shared_address(&shared.sums_here), round & 1);
#pragma unroll 1
        for (int i = own_thread(); i < num_units * kOutputs; i += kConsumers) {
            int output = i % kOutputs, token = output / kUnitRows;
            int unit = (int)blockIdx.x + (first_unit + i / kOutputs) * (int)gridDim.x;
            if (token >= num_tokens || unit >= order.num_units) continue;
            const float *sums = &shared.sums[i / kOutputs * per_unit][output];
            float value = add_chunks<kOutputs>(sums, order.num_chunks), second = value;
            if (order.parts == 2)
                second = add_chunks<kOutputs>(sums + order.num_chunks * kOutputs, order.num_chunks);
            epilogue(token, unit * kUnitRows + output % kUnitRows, value, second);
        }
        end_round(shared);
        ++round;
        if (phase == kPhaseGateUp && first_unit == 0) announce_first_round();
        if (first_unit + order.units_per_round < order.own_units) consumer_barrier();  // the sums are read
    }
    if (phase == kPhaseGateUp && order.own_units == 0) announce_first_round();
    if (is_awaited) finish_grid_barrier();
}
