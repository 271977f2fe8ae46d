// decode_batch_attention.cu -- attention of a decode batch: each warp works by itself.
//
//   out[t, h] = fold of segments, ascending, of folds of tiles, ascending
//
// Shapes    q [num_seqs, num_heads, 64]; out packed (decode_batch.cuh), k tile h being head h
// Rounding  docs/numerics.md section 4
// Mapping   persistent; a warp's task is some segments (of 1024 keys) of one sequence and kv head, as
//           many as a warp has on the average: most rows are one task. It copies the halves of the tiles'
//           K and V into a ring of its own, ahead of its work and across tasks, and folds tile after tile
//           in registers. Of a row with several tasks the last warp to finish folds the segments
// Cost      256 bytes per key and kv head: memory-bound
// See       decode_tile.cuh, twin/attention.c, tests/kernels/test_bits_decode_batch.py

#include <math.h>

#include "decode_batch_pieces.cuh"

// A warp's row g after some tiles: this lane's columns 8 f + 2 q and + 1.
struct RowState {
    float max, sum;
    float values[kDimGroups][2];

    __device__ __forceinline__ void fold(const RowState &next) {
        float largest = fmaxf(max, next.max);
        float keep = contract_exp2(__fsub_rn(max, largest)),
              take = contract_exp2(__fsub_rn(next.max, largest));
        max = largest;
        sum = __fmaf_rn(next.sum, take, __fmul_rn(sum, keep));
#pragma unroll
        for (int f = 0; f < kDimGroups; ++f) {
#pragma unroll
            for (int e = 0; e < 2; ++e)
                values[f][e] = __fmaf_rn(next.values[f][e], take, __fmul_rn(values[f][e], keep));
        }
    }
};

// Where the warp's work stands in its ring.
struct PiecePlace {
    int slot = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        slot = slot + 1 < kSlots ? slot + 1 : 0;
        parity ^= slot == 0;
    }
};

static __device__ __forceinline__ void attend_tile(RowState &state, PieceSource &source, PiecePlace &place,
                                                   const uint32_t (&query)[kDimSteps][2], int num_keys,
                                                   float scale) {
    int lane = (int)threadIdx.x % kWarp, q = lane % 4;
    int num_steps = (num_keys + NUMERICS_STEP - 1) / NUMERICS_STEP;
    int halves = (num_keys + kPieceKeys - 1) / kPieceKeys;
    float scores[kKeyGroups][2];
    uint32_t rows = 0;
    // The piece is read: its slot takes the next one.
    auto finish_piece = [&]() {
        __syncwarp();
        place.advance();
        if (source.has_piece()) source.copy_piece();
    };
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
        if (s % kStepsPerHalf == 0 && s / kStepsPerHalf < halves) {
            barrier_wait(shared_address(&source.full[place.slot]), place.parity);
            rows = source.ring + place.slot * kPieceBytes;
        }
        if (s < num_steps)
            score_keys(scores[2 * s], scores[2 * s + 1], query, rows + s % kStepsPerHalf * kStepBytes);
        if ((s + 1) * NUMERICS_STEP > num_keys) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = s * NUMERICS_STEP + i / 2 * 8 + 2 * q + i % 2;
                if (key >= num_keys) scores[2 * s + i / 2][i % 2] = __int_as_float(0xff800000);  // P is +0
            }
        }
        if (s % kStepsPerHalf == kStepsPerHalf - 1 && s / kStepsPerHalf < halves) finish_piece();
    }
    uint32_t p[kKeyGroups];
    softmax_row(p, state.max, state.sum, scores, scale);
    float out[kDimGroups][4] = {};
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
        if (s % kStepsPerHalf == 0 && s / kStepsPerHalf < halves) {
            barrier_wait(shared_address(&source.full[place.slot]), place.parity);
            rows = source.ring + place.slot * kPieceBytes;
            // What follows the last key in its sixteen counts as zero, whatever the memory holds.
            int end = num_steps * NUMERICS_STEP, half_end = (s / kStepsPerHalf + 1) * kPieceKeys;
            if (num_keys < end && end <= half_end) {
                for (int i = lane; i < (end - num_keys) * kChunksPerRow; i += kWarp)
                    store_shared_zero_16(rows + (num_keys % kPieceKeys) * kKeyBytes + i * 16);
                fence_async_proxy();  // they come before the copy that fills the slot again
                __syncwarp();         // and before any lane reads them
            }
        }
        if (s < num_steps) weigh_values(out, p[2 * s], p[2 * s + 1], rows + s % kStepsPerHalf * kStepBytes);
        if (s % kStepsPerHalf == kStepsPerHalf - 1 && s / kStepsPerHalf < halves) finish_piece();
    }
#pragma unroll
    for (int f = 0; f < kDimGroups; ++f) {
        state.values[f][0] = out[f][0];
        state.values[f][1] = out[f][1];
    }
}

static __device__ __forceinline__ void write_row(const RowState &state, const AttentionArguments &args,
                                                 const Task &task, int head) {
    int q = (int)threadIdx.x % 4;
    float inverse = __frcp_rn(state.sum);
#pragma unroll
    for (int f = 0; f < kDimGroups; ++f) {
        bf16 *to = args.out + packed_row_offset(task.sequence, head * kChunksPerRow + f, args.num_heads,
                                                args.tile_tokens);
        *reinterpret_cast<uint32_t *>(to + 2 * q) =
            pack_bf16(__fmul_rn(state.values[f][0], inverse), __fmul_rn(state.values[f][1], inverse));
    }
}

// A segment's result to memory, by the lanes that hold a row.
static __device__ __forceinline__ void store_segment(const RowState &state, float *segments, int segment) {
    int q = (int)threadIdx.x % 4;
    float *to = segments + segment * kPartialColumns;
#pragma unroll
    for (int f = 0; f < kDimGroups; ++f)
        *reinterpret_cast<float2 *>(to + f * 8 + 2 * q) =
            make_float2(state.values[f][0], state.values[f][1]);
    if (q == 0) *reinterpret_cast<float2 *>(to + kTileCols) = make_float2(state.max, state.sum);
}

// Whether this warp is the last of its row's to come here.
static __device__ __forceinline__ bool is_last_of_row(const AttentionArguments &args, const Task &task) {
    fence_gpu();   // this lane's segments are out before the ticket
    __syncwarp();  // and every lane's
    int is_last = 0;
    if (threadIdx.x % kWarp == 0) {
        unsigned *ticket = args.tickets + task.sequence * args.cache.num_kv_heads + task.kv_head;
        is_last = atomicAdd(ticket, 1) == (unsigned)task.num_tasks - 1;
        if (is_last) *ticket = 0;
    }
    is_last = __shfl_sync(kFullWarp, is_last, 0);
    fence_gpu();  // the other warps' segments after their tickets
    return is_last;
}

static __device__ __forceinline__ void fold_segments(RowState &row, const float *segments,
                                                     int num_segments) {
    int q = (int)threadIdx.x % 4;
#pragma unroll 1
    for (int i = 0; i < num_segments; ++i) {
        const float *from = segments + i * kPartialColumns;
        RowState part;
#pragma unroll
        for (int f = 0; f < kDimGroups; ++f) {
            float2 v = __ldcg(reinterpret_cast<const float2 *>(from + f * 8 + 2 * q));
            part.values[f][0] = v.x, part.values[f][1] = v.y;
        }
        float2 v = __ldcg(reinterpret_cast<const float2 *>(from + kTileCols));
        part.max = v.x, part.sum = v.y;
        if (i == 0) {
            row = part;
        } else {
            row.fold(part);
        }
    }
}

static __device__ __forceinline__ void attend(const AttentionArguments &args, PieceSource &source,
                                              PiecePlace &place, const Task &task) {
    int lane = (int)threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    int group = args.num_heads / args.cache.num_kv_heads;
    bool is_row = g < group;
    int head = task.kv_head * group + (is_row ? g : 0);  // rows beyond repeat the first
    size_t row_index = (size_t)task.sequence * args.num_heads + head;
    float *segments = args.segments + row_index * args.max_segments * kPartialColumns;
    uint32_t query[kDimSteps][2];
#pragma unroll
    for (int s = 0; s < kDimSteps; ++s) {
        query[s][0] = load_pair(args.q + row_index * kTileCols + s * NUMERICS_STEP + 2 * q);
        query[s][1] = load_pair(args.q + row_index * kTileCols + s * NUMERICS_STEP + 2 * q + 8);
    }
    RowState row, segment, tile;
#pragma unroll 1
    for (int i = 0; i < task.num_tiles; ++i) {
        attend_tile(tile, source, place, query, task.num_keys(task.first_tile + i), args.scale);
        if (i % NUMERICS_SEGMENT == 0) {
            segment = tile;
        } else {
            segment.fold(tile);
        }
        if (i % NUMERICS_SEGMENT != NUMERICS_SEGMENT - 1 && i != task.num_tiles - 1) continue;
        if (task.num_tasks > 1) {
            if (is_row) store_segment(segment, segments, (task.first_tile + i) / NUMERICS_SEGMENT);
        } else if (i < NUMERICS_SEGMENT) {
            row = segment;
        } else {
            row.fold(segment);
        }
    }
    if (task.num_tasks > 1) {
        if (!is_last_of_row(args, task)) return;
        fold_segments(row, segments, task.num_segments());
    }
    if (is_row) write_row(row, args, task, head);
}

static __global__ void __launch_bounds__(kThreads, 1)
    batch_attention_kernel(const __grid_constant__ AttentionArguments args) {
    extern __shared__ unsigned char raw[];
    __shared__ AttentionShared shared;
    int warp = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    if (lane < kSlots) barrier_init(shared_address(&shared.full[warp][lane]), 1);
    if (lane < kSlots) barrier_init_fence();
    let_next_kernel_start();
    // The kernel before this one let it start after its own wait: the header is there, and the keys and
    // values of earlier steps.
    deal_tasks(shared, args);
    uint32_t base = (shared_address(raw) + kAlignment - 1) / kAlignment * kAlignment;
    int num_tasks = shared.first_task[shared.num_seqs];
    // Neighbouring tasks go to different multiprocessors.
    int first = warp * (int)gridDim.x + (int)blockIdx.x, stride = kWarps * (int)gridDim.x;
    PieceSource source = {shared,
                          args,
                          base + warp * kSlots * kPieceBytes,
                          shared.full[warp],
                          first,
                          stride,
                          num_tasks,
                          {},
                          0,
                          0,
                          0,
                          {}};
    PiecePlace place;
    bool has_task = source.take_task();
    int num_copied = 0;
#pragma unroll 1
    for (; has_task && num_copied < kSlots && source.has_piece() && source.is_old(); ++num_copied)
        source.copy_piece();
    wait_for_previous_kernel();
#pragma unroll 1
    for (; has_task && num_copied < kSlots && source.has_piece(); ++num_copied) source.copy_piece();
#pragma unroll 1
    for (int number = first; number < num_tasks; number += stride)
        attend(args, source, place, find_task(shared, args, number));
}

Status launch_batch_attention(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    AttentionArguments args = {};
    args.cache = layer.cache;
    args.q = step.buffers.q;
    args.out = step.buffers.attn;
    args.header = step.buffers.header;
    args.tickets = step.buffers.tickets;
    args.segments = step.buffers.segments;
    args.num_heads = step.problem.num_heads;
    args.max_segments = step.max_segments;
    args.tile_tokens = step.tile_tokens;
    args.scale = (float)(1.4426950408889634074 / sqrt((double)kTileCols));
    return launch_chained(batch_attention_kernel, dim3((unsigned)step.num_multiprocessors), kThreads,
                          kRingBytes + kAlignment, 1, stream, args);
}
