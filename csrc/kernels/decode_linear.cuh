// decode_linear.cuh -- the consumers' side of the linear layers and of RMSNorm in the persistent decode
// kernel.
//
// A warp takes one chunk of one unit: eight weight rows are the columns of mma.m16n8k16, the tokens its
// rows. Chunk sums meet in shared memory and are added in order, docs/numerics.md section 2.

#pragma once
#include "decode_step.cuh"

constexpr int kStepsPerTile = kTileCols / NUMERICS_STEP;

// The operands of one k tile: of the tokens (rows g) and of the weights (columns g), two steps each.
struct TileFragments {
    uint32_t tokens[2][4];
    uint32_t weights[2][4];

    __device__ __forceinline__ void load(uint32_t token_address, uint32_t strip, int lane) {
        load_matrix_x4(tokens[0], token_address);
        load_matrix_x4(weights[0], strip + tile_offset(lane % 8, lane / 8) * (int)sizeof(bf16));
        load_matrix_x4(tokens[1], token_address + kTileCols);  // 32 columns further
        load_matrix_x4(weights[1], strip + tile_offset(lane % 8, lane / 8 + 4) * (int)sizeof(bf16));
    }
    __device__ __forceinline__ void multiply(float (&acc)[4]) const {
#pragma unroll
        for (int s = 0; s < kStepsPerTile; ++s) {
            const uint32_t (&x)[4] = tokens[s / 2];
            const uint32_t rows[4] = {x[s % 2 * 2], 0, x[s % 2 * 2 + 1], 0};
            mma_m16n8k16(acc, rows, weights[s / 2][s % 2 * 2], weights[s / 2][s % 2 * 2 + 1]);
        }
    }
};

// The chain of one piece, 8 tokens x 8 weight rows, into sums. `tokens` is the address at which this lane
// reads the chunk's first k tile: chunk lane / 8 of the row of token lane % 8.
static __device__ __forceinline__ void piece_sums(StepShared &shared, uint32_t tokens, int piece,
                                                  int num_tiles, float *sums) {
    constexpr int kTileBytes = kTileCols * (int)sizeof(bf16);
    int lane = own_thread() % kWarp;
    uint32_t strip = wait_for_piece(shared, piece);
    float acc[4] = {};
    TileFragments even, odd;
    even.load(tokens, strip, lane);
#pragma unroll 1
    for (int tile = 0; tile < num_tiles;
         tile += 2) {  // the next tile is loaded while this one's chain runs
        if (tile + 1 < num_tiles) {
            odd.load(tokens + (tile + 1) * kTileBytes, strip + (tile + 1) * kStripBytes, lane);
        }
        even.multiply(acc);
        if (tile + 2 < num_tiles) {
            even.load(tokens + (tile + 2) * kTileBytes, strip + (tile + 2) * kStripBytes, lane);
        }
        if (tile + 1 < num_tiles) odd.multiply(acc);
    }
    __syncwarp();  // every lane has read the piece before it is filled again
    if (lane == 0) release_piece(shared, piece);
    *reinterpret_cast<float2 *>(sums + lane / 4 * kUnitRows + lane % 4 * 2) = make_float2(acc[0], acc[1]);
}

// Columns first .. first + width - 1 of the tokens' rows into shared.input.
static __device__ __forceinline__ void stage_input(StepShared &shared, const bf16 *rows, int cols,
                                                   int first, int width, int stride, int num_tokens) {
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

// The block's pieces of one phase. `rows` [num_tokens, cols] are other blocks' results; null if
// shared.input holds the normalised rows already. epilogue(token, row, value, second) gets each output
// once, `second` being the paired matrix's value; thread i gets outputs i, i + kConsumers, .. of each
// round.
template <typename Epilogue>
static __device__ __forceinline__ void compute_phase(StepShared &shared, int &piece, int phase,
                                                     const bf16 *rows, int num_tokens, Epilogue epilogue) {
    int thread = own_thread(), warp = thread / kWarp, lane = thread % kWarp;
    const PhaseOrder order = shared.orders[phase];
    int per_unit = order.parts * order.num_chunks;
    int stride = min(order.chunks_per_group * NUMERICS_CHUNK, order.cols) + kInputPadding;
    // Rows beyond the last token repeat the first: their results are never read.
    int token_row = lane % 8 < num_tokens ? lane % 8 : 0;
    uint32_t tokens = shared_address(shared.input + token_row * stride + lane / 8 * kChunkValues);
#pragma unroll 1
    for (int first_unit = 0; first_unit < order.own_units; first_unit += order.units_per_round) {
        int num_units = min(order.units_per_round, order.own_units - first_unit);
#pragma unroll 1
        for (int first_chunk = 0; first_chunk < order.num_chunks; first_chunk += order.chunks_per_group) {
            int chunks = min(order.chunks_per_group, order.num_chunks - first_chunk);
            int first_k = first_chunk * NUMERICS_CHUNK;
            int width = min(chunks * NUMERICS_CHUNK, order.cols - first_k);
            if (rows != nullptr && (first_unit == 0 || chunks < order.num_chunks)) {
                if (first_unit + first_chunk > 0) consumer_barrier();  // the previous columns are read
                stage_input(shared, rows, order.cols, first_k, width, stride, num_tokens);
            }
            // Which warp takes which piece follows from the piece's number in the whole stream.
            int task = (warp - piece % kConsumerWarps + kConsumerWarps) % kConsumerWarps;
            int num_tasks = num_units * order.parts * chunks, part = 0, chunk = task;
#pragma unroll 1
            for (; task < num_tasks; task += kConsumerWarps, chunk += kConsumerWarps) {
#pragma unroll 1
                for (; chunk >= chunks; chunk -= chunks) ++part;
                int tiles = min(NUMERICS_CHUNK, width - chunk * NUMERICS_CHUNK) / kTileCols;
                piece_sums(shared, tokens + chunk * NUMERICS_CHUNK * (int)sizeof(bf16), piece + task, tiles,
                           shared.sums[part * order.num_chunks + first_chunk + chunk]);
            }
            piece += num_tasks;
        }
        consumer_barrier();  // the round's chunk sums visible to the threads that add them
#pragma unroll 1
        for (int i = own_thread(); i < num_units * kOutputs; i += kConsumers) {
            int output = i % kOutputs, token = output / kUnitRows;
            if (token >= num_tokens) continue;
            const float (*sums)[kOutputs] = &shared.sums[i / kOutputs * per_unit];
            float value = 0.0f, second = 0.0f;
#pragma unroll 1
            for (int part = 0; part < order.parts; ++part, sums += order.num_chunks) {
                value = second;
                second = sums[0][output];
#pragma unroll 4
                for (int c = 1; c < order.num_chunks; ++c) second = __fadd_rn(second, sums[c][output]);
            }
            int unit = (int)blockIdx.x + (first_unit + i / kOutputs) * (int)gridDim.x;
            epilogue(token, unit * kUnitRows + output % kUnitRows, order.parts == 2 ? value : second,
                     second);
        }
        if (first_unit + order.units_per_round < order.own_units) consumer_barrier();  // the sums are read
    }
}

// RMSNorm of all tokens into shared.input, docs/numerics.md section 5: thread i is the contract's lane i
// and works on the values it copied itself. The weight is the stream's next piece.
static __device__ __forceinline__ void norm_phase(StepShared &shared, int &piece, const bf16 *residual,
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
        const float *s = shared.norm_sums[lane % kStepTokens];
        float sum = __fadd_rn(__fadd_rn(__fadd_rn(s[0], s[4]), __fadd_rn(s[2], s[6])),
                              __fadd_rn(__fadd_rn(s[1], s[5]), __fadd_rn(s[3], s[7])));
        float scale = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)hidden), eps)));
        wait_for_piece(shared, piece);
        float weights[kVector] = {};
        if (has_values)
            unpack(weights,
                   load_vector(reinterpret_cast<const bf16 *>(shared.ring[slot_of(piece)]) + first));
#pragma unroll 4
        for (int token = 0; token < num_tokens; ++token) {
            float own_scale = __shfl_sync(kFullWarp, scale, token), x[kVector];
            if (!has_values) continue;
            unpack(x, load_vector(own + token * stride));
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                x[j] = __fmul_rn(weights[j], to_float(to_bf16(__fmul_rn(x[j], own_scale))));
            store_vector(own + token * stride, pack(x));
        }
    }
    consumer_barrier();  // the normalised rows visible to every warp, the weight read by all
    if (thread == 0) release_piece(shared, piece);
    ++piece;
}

static __device__ __forceinline__ bf16 silu_and_mul(float gate, float up) {
    float g = to_float(to_bf16(gate)), u = to_float(to_bf16(up));
    float e = contract_exp2(__fmul_rn(-g, __int_as_float(LOG2_E)));
    return to_bf16(__fmul_rn(to_float(to_bf16(__fdiv_rn(g, __fadd_rn(1.0f, e)))), u));
}
