// decode_linear.cuh -- the consumers' side of the linear layers and of RMSNorm in the persistent decode
// kernel.
//
// A warp takes one chunk of one unit out of the ring into its registers, then multiplies: eight weight rows
// are the columns of mma.m16n8k16, the tokens its rows. Chunk sums meet in shared memory and are added in order, docs/numerics.md section 2.

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

    // Its chain, 8 weight rows x up to 8 tokens, into sums. `tokens` is the address at which this lane reads
    // the chunk's first k tile: chunk lane / 8 of the row of token lane % 8.
    template <int kTokens>
    __device__ __forceinline__ void multiply(uint32_t tokens, int num_tiles, float *sums) const {
        constexpr int kTileBytes = kTileCols * (int)sizeof(bf16);
        int lane = own_thread() % kWarp;
        float acc[4] = {};
#pragma unroll
        for (int tile = 0; tile < kChunkTiles; ++tile) {
            if (tile >= num_tiles) break;
            uint32_t x[2][4];
            load_matrix_x4(x[0], tokens + tile * kTileBytes);
            load_matrix_x4(x[1], tokens + tile * kTileBytes + kTileCols);  // 32 columns further
#pragma unroll
            for (int s = 0; s < kStepsPerTile; ++s) {
                const uint32_t rows[4] = {x[s / 2][s % 2 * 2], 0, x[s / 2][s % 2 * 2 + 1], 0};
                mma_m16n8k16(acc, rows, weights[tile][s / 2][s % 2 * 2],
                             weights[tile][s / 2][s % 2 * 2 + 1]);
            }
        }
        if (lane / 4 < kTokens)
            *reinterpret_cast<float2 *>(sums + lane / 4 * kUnitRows + lane % 4 * 2) =
                make_float2(acc[0], acc[1]);
    }
};

// A warp's first task of a group of chunks, by the number of the group's first piece in the whole stream.
__device__ __forceinline__ int first_task(int piece) {
    return (own_thread() / kWarp - piece % kConsumerWarps + kConsumerWarps) % kConsumerWarps;
}

// Takes the warp's first piece of a phase, if it has one, whose first weights are piece `piece`.
template <typename Shared>
static __device__ __forceinline__ void hold_first(Shared &shared, HeldPiece &held, int piece, int phase) {
    const PhaseOrder &order = shared.orders[phase];
    int task = first_task(piece), chunks = order.chunks_per_group;
    int num_tasks = min(order.units_per_round, order.own_units) * order.parts * chunks;
    if (task >= num_tasks) return;
    int tiles = min(NUMERICS_CHUNK, order.cols - task % chunks * NUMERICS_CHUNK) / kTileCols;
    held.take(shared, piece + task, tiles);
}

// Columns first .. first + width - 1 of the tokens' rows into shared.input.
template <typename Shared>
static __device__ __forceinline__ void stage_input(Shared &shared, const bf16 *rows, int cols, int first,
                                                   int width, int stride, int num_tokens) {
#pragma unroll 4
    for (int token = 0; token < num_tokens; ++token) {
        const bf16 *from = rows + (size_t)token * cols + first;
        uint32_t to = shared_address(shared.input + token * stride);
        for (int column = own_thread() * kVector; column < width; column += kConsumers * kVector)
            copy_async_16(to + column * (int)sizeof(bf16), from + column, 16);
    }
    copy_async_commit();
    copy_async_wait<0>();
    consumer_barrier();  // the rows visible to every warp
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

// The block's pieces of one phase, of which the warps hold the first already. `rows` [num_tokens, cols] are
// other blocks' results; null if shared.input holds the normalised rows already. epilogue(token, row, value,
// second) gets each output once, `second` being the paired matrix's value; thread i gets outputs i,
// i + kConsumers, .. of each round.
template <typename Shared, typename Epilogue>
static __device__ __forceinline__ void compute_phase(Shared &shared, HeldPiece &held, int &piece, int phase,
                                                     const bf16 *rows, int num_tokens, Epilogue epilogue) {
    int lane = own_thread() % kWarp;
    constexpr int kOutputs = Shared::kOutputs;
    const PhaseOrder order = shared.orders[phase];
    int per_unit = order.parts * order.num_chunks;
    int stride = min(order.chunks_per_group * NUMERICS_CHUNK, order.cols) + kInputPadding;
    // Rows beyond the last token repeat the first: their results are never read.
    int token_row = lane % 8 < num_tokens ? lane % 8 : 0;
    uint32_t tokens = shared_address(shared.input + token_row * stride + lane / 8 * kChunkValues);
    bool is_awaited = phase == kPhaseDown;  // the rest of the input
#pragma unroll 1
    for (int first_unit = 0; first_unit < order.own_units; first_unit += order.units_per_round) {
        int num_units = min(order.units_per_round, order.own_units - first_unit);
#pragma unroll 1
        for (int first_chunk = 0; first_chunk < order.num_chunks; first_chunk += order.chunks_per_group) {
            int chunks = min(order.chunks_per_group, order.num_chunks - first_chunk);
            int first_k = first_chunk * NUMERICS_CHUNK;
            int width = min(chunks * NUMERICS_CHUNK, order.cols - first_k);
            // Which warp takes which piece follows from the piece's number in the whole stream.
            int task = first_task(piece), part = 0, chunk = task;
            int num_tasks = num_units * order.parts * chunks;
            bool is_held = first_unit + first_chunk == 0;  // the warp's first piece
            if (is_awaited && first_k + width > order.early_cols) {
                if (!is_held && task < num_tasks)
                    held.take(shared, piece + task,
                              min(NUMERICS_CHUNK, width - task % chunks * NUMERICS_CHUNK) / kTileCols);
                is_held = true;
                finish_grid_barrier();
                is_awaited = false;
            }
            if (rows != nullptr && (first_unit == 0 || chunks < order.num_chunks)) {
                if (first_unit + first_chunk > 0) consumer_barrier();  // the previous columns are read
                stage_input(shared, rows, order.cols, first_k, width, stride, num_tokens);
            }
#pragma unroll 1
            for (; task < num_tasks; task += kConsumerWarps, chunk += kConsumerWarps) {
#pragma unroll 1
                for (; chunk >= chunks; chunk -= chunks) ++part;
                int tiles = min(NUMERICS_CHUNK, width - chunk * NUMERICS_CHUNK) / kTileCols;
                if (!is_held) held.take(shared, piece + task, tiles);
                is_held = false;
                held.template multiply<Shared::kTokens>(
                    tokens + chunk * NUMERICS_CHUNK * (int)sizeof(bf16), tiles,
                    shared.sums[part * order.num_chunks + first_chunk + chunk]);
            }
            piece += num_tasks;
        }
        consumer_barrier();  // the round's chunk sums visible to the threads that add them
#pragma unroll 1
        for (int i = own_thread(); i < num_units * kOutputs; i += kConsumers) {
            int output = i % kOutputs, token = output / kUnitRows;
            if (token >= num_tokens) continue;
            const float *sums = &shared.sums[i / kOutputs * per_unit][output];
            float value = add_chunks<kOutputs>(sums, order.num_chunks), second = value;
            if (order.parts == 2)
                second = add_chunks<kOutputs>(sums + order.num_chunks * kOutputs, order.num_chunks);
            int unit = (int)blockIdx.x + (first_unit + i / kOutputs) * (int)gridDim.x;
            epilogue(token, unit * kUnitRows + output % kUnitRows, value, second);
        }
        if (phase == kPhaseGateUp && first_unit == 0) announce_first_round();
        if (first_unit + order.units_per_round < order.own_units) consumer_barrier();  // the sums are read
    }
    if (phase == kPhaseGateUp && order.own_units == 0) announce_first_round();
    if (is_awaited) finish_grid_barrier();
}

// sum / count, rounded; where count is a power of two, by a product: the same exact value, rounded once too.
__device__ __forceinline__ float mean_of(float sum, int count) {
    if ((count & (count - 1)) != 0) return __fdiv_rn(sum, (float)count);
    return __fmul_rn(sum, __int_as_float((127 - 31 + __clz(count)) << 23));
}

// RMSNorm of all tokens into shared.input, docs/numerics.md section 5: thread i is the contract's lane i
// and works on the values it copied itself. The weight is the stream's next piece.
template <typename Shared>
static __device__ __forceinline__ void norm_phase(Shared &shared, int &piece, const bf16 *residual,
                                                  int hidden, float eps, int num_tokens) {
    int thread = own_thread(), warp = thread / kWarp, lane = thread % kWarp;
    int stride = hidden + kInputPadding, first = thread * kVector;
    bool has_values = thread < NUMERICS_NORM_LANES && first < hidden;
    bf16 *own = shared.input + first;
    if (has_values) {
#pragma unroll 1
        for (int token = 0; token < num_tokens; ++token)
            copy_async_16(shared_address(own + token * stride), residual + (size_t)token * hidden + first,
                          16);
    }
    copy_async_commit();
    copy_async_wait<0>();
    if (warp < kNormGroups) {
#pragma unroll 4
        for (int token = 0; token < num_tokens; ++token) {
            float sum = 0.0f;
            if (has_values) {
                float x[kVector];
                unpack(x, load_vector(own + token * stride));
#pragma unroll
                for (int j = 0; j < kVector; ++j) sum = __fadd_rn(sum, __fmul_rn(x[j], x[j]));
            }
#pragma unroll
            for (int offset = kWarp / 2; offset > 0; offset /= 2)
                sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, offset));
            if (lane == 0) shared.norm_sums[token][warp] = sum;
        }
    }
    consumer_barrier();  // the sums of all groups visible to every warp
    if (warp < kNormGroups) {
        // The eight group sums by xor 4, 2, 1, and the scale, of token lane % 8.
        const float *s = shared.norm_sums[lane % Shared::kTokens];
        float sum = __fadd_rn(__fadd_rn(__fadd_rn(s[0], s[4]), __fadd_rn(s[2], s[6])),
                              __fadd_rn(__fadd_rn(s[1], s[5]), __fadd_rn(s[3], s[7])));
        float scale = __frcp_rn(__fsqrt_rn(__fadd_rn(mean_of(sum, hidden), eps)));
        wait_for_piece(shared, piece);
        float weights[kVector] = {};
        if (has_values)
            unpack(weights, load_vector(reinterpret_cast<const bf16 *>(slot_of(shared, piece)) + first));
#pragma unroll 4
        for (int token = 0; token < num_tokens; ++token) {
            float own_scale = __shfl_sync(kFullWarp, scale, token), x[kVector];
            if (!has_values) continue;
            unpack(x, load_vector(own + token * stride));
#pragma unroll
            for (int j = 0; j < kVector; j += 2) {
                uint32_t pair = pack_bf16(__fmul_rn(x[j], own_scale), __fmul_rn(x[j + 1], own_scale));
                x[j] = __fmul_rn(weights[j], low_float(pair));
                x[j + 1] = __fmul_rn(weights[j + 1], high_float(pair));
            }
            store_vector(own + token * stride, pack(x));
        }
    }
    consumer_barrier();  // the normalised rows visible to every warp, the weight read by all
    if (thread == 0) release_piece(shared, piece);
    ++piece;
}
