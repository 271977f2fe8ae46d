// decode_batch_attention.cu -- attention of a decode batch: each warp works by itself.
//
//   out[t, h] = fold of segments, ascending, of folds of tiles, ascending
//
// Shapes    q [num_seqs, num_heads, 64]; out packed (decode_batch.cuh), k tile h being head h
// Rounding  docs/numerics.md section 4
// Mapping   persistent; a warp's task is one segment (1024 keys) of one sequence and kv head. It copies the
//           halves of the tiles' K and V into a ring of its own, ahead of its work and across tasks, and
//           folds tile after tile in registers. The last warp of a row with several segments folds those
// Cost      256 bytes per key and kv head: memory-bound
// See       decode_tile.cuh, twin/attention.c, tests/kernels/test_bits_decode_batch.py

#include <math.h>

#include "decode_batch.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kSlots = 3;  // of a warp's ring: 192 KiB in all
constexpr int kPieceBytes = kPieceKeys * kKeyBytes;
constexpr int kRingBytes = kWarps * kSlots * kPieceBytes;
constexpr int kSmallestBlock = 16;  // tokens of a KV block
constexpr int kLaneBlocks = kSegmentKeys / kSmallestBlock / kWarp;
constexpr int kParts = 4;  // pieces of a tile: K, K, V, V
constexpr int kAlignment = 1024;

struct AttentionArguments {
    KvLayer cache;
    const bf16 *q;
    bf16 *out;
    const int32_t *seq_lens, *block_tables;
    unsigned *tickets;
    float *segments;
    int max_blocks_per_seq, num_seqs, num_heads, max_segments, tile_tokens;
    float scale;
};

struct AttentionShared {
    int first_task[kBatchMaxSeqs + 1];  // of each sequence; the last is the number of all
    int lengths[kBatchMaxSeqs];
    int warp_sums[kWarps];
    uint64_t full[kWarps][kSlots];
};

struct Task {
    int sequence, kv_head, segment, num_segments, length;
    int first_tile, num_tiles;

    // Keys of a tile, and the halves that hold some.
    __device__ int num_keys(int tile) const { return min(NUMERICS_TILE, length - tile * NUMERICS_TILE); }
    __device__ int halves(int tile) const { return (num_keys(tile) + kPieceKeys - 1) / kPieceKeys; }
};

// Every sequence's first task, by the whole block: a prefix sum over segments times kv heads.
static __device__ __forceinline__ void deal_tasks(AttentionShared &shared, const AttentionArguments &args) {
    int thread = (int)threadIdx.x, lane = thread % kWarp;
    static_assert(kThreads >= kBatchMaxSeqs, "a thread per sequence");
    int length = thread < args.num_seqs ? args.seq_lens[thread] : 0;
    int count = (length + kSegmentKeys - 1) / kSegmentKeys * args.cache.num_kv_heads, sum = count;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        int below = __shfl_up_sync(kFullWarp, sum, offset);
        if (lane >= offset) sum += below;
    }
    if (lane == kWarp - 1) shared.warp_sums[thread / kWarp] = sum;
    __syncthreads();  // every warp's sum visible
    for (int i = 0; i < thread / kWarp; ++i) sum += shared.warp_sums[i];
    shared.lengths[thread] = length;
    shared.first_task[thread + 1] = sum;
    if (thread == 0) shared.first_task[0] = 0;
    __syncthreads();  // the table is there
}

// Task number `index`; the sequence by bisection.
static __device__ __forceinline__ Task find_task(const AttentionShared &shared,
                                                 const AttentionArguments &args, int index) {
    int low = 0, high = args.num_seqs - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (shared.first_task[middle] <= index) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Task task;
    int within = index - shared.first_task[low], heads = args.cache.num_kv_heads;
    task.sequence = low;
    task.segment = within / heads;
    task.kv_head = within - task.segment * heads;
    task.length = shared.lengths[low];
    task.num_segments = (task.length + kSegmentKeys - 1) / kSegmentKeys;
    task.first_tile = task.segment * NUMERICS_SEGMENT;
    task.num_tiles =
        min(NUMERICS_SEGMENT, (task.length + NUMERICS_TILE - 1) / NUMERICS_TILE - task.first_tile);
    return task;
}

// A warp's copies: it walks the pieces of its tasks ahead of the warp's work. All members are the same in
// every lane, but for the blocks: lane i knows those of runs i and 32 + i of the segment.
struct PieceSource {
    AttentionShared &shared;
    const AttentionArguments &args;
    uint32_t ring;
    uint64_t *full;
    int next_task, stride, num_tasks;
    Task task;
    int tile, part;  // tile counts from the segment's first
    int slot;
    int blocks[kLaneBlocks];

    // Looks up the next task's blocks; false where there is none.
    __device__ __forceinline__ bool take_task() {
        if (next_task >= num_tasks) return false;
        task = find_task(shared, args, next_task);
        next_task += stride;
        tile = part = 0;
        int lane = (int)threadIdx.x % kWarp;
        int run_keys = min(kPieceKeys, args.cache.block_size);
        const int32_t *table = args.block_tables + (size_t)task.sequence * args.max_blocks_per_seq;
#pragma unroll
        for (int i = 0; i < kLaneBlocks; ++i) {
            int key = task.segment * kSegmentKeys + (i * kWarp + lane) * run_keys;
            bool exists = (i * kWarp + lane) * run_keys < kSegmentKeys && key < task.length;
            blocks[i] = exists ? table[key / args.cache.block_size] : 0;
        }
        return true;
    }
    __device__ __forceinline__ bool has_piece() const { return task.num_tiles > 0; }

    // Asks for the piece at hand and moves on.
    __device__ __forceinline__ void copy_piece() {
        int lane = (int)threadIdx.x % kWarp, block_size = args.cache.block_size;
        int half = part % 2, is_value = part / 2, absolute = task.first_tile + tile;
        int run_keys = min(kPieceKeys, block_size), runs = kPieceKeys / run_keys;
        int first_key = absolute * NUMERICS_TILE + half * kPieceKeys;
        int keys = min(kPieceKeys, task.length - first_key);
        int run = (tile * 2 + half) * runs + lane % runs;  // of the segment
        int block = __shfl_sync(kFullWarp, blocks[0], run % kWarp);
        int later = __shfl_sync(kFullWarp, blocks[1], run % kWarp);
        if (run >= kWarp) block = later;
        uint32_t barrier = shared_address(&full[slot]), to = ring + slot * kPieceBytes;
        if (lane == 0) barrier_arrive_expect(barrier, keys * kKeyBytes);
        __syncwarp();  // the bytes are expected before the first arrive
        int own_keys = min(run_keys, keys - lane * run_keys);
        if (lane < runs && own_keys > 0) {
            int key = first_key + lane * run_keys;
            const bf16 *from = args.cache.data +
                               kv_tile_offset(block, task.kv_head, args.cache.num_kv_heads, block_size) +
                               ((size_t)(key % block_size) + (is_value ? block_size : 0)) * kTileCols;
            copy_bulk(to + lane * run_keys * kKeyBytes, from, own_keys * kKeyBytes, barrier);
        }
        slot = slot + 1 < kSlots ? slot + 1 : 0;
        ++part;
        if (part % 2 == 1 && task.halves(absolute) == 1) ++part;
        if (part < kParts) return;
        part = 0;
        if (++tile < task.num_tiles) return;
        if (!take_task()) task.num_tiles = 0;
    }
};

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

// A segment's result to memory; the last warp of the row folds them all, in order.
static __device__ __forceinline__ void join_segments(RowState &state, const AttentionArguments &args,
                                                     const Task &task, int head, bool is_row) {
    int lane = (int)threadIdx.x % kWarp, q = lane % 4;
    size_t row = (size_t)task.sequence * args.num_heads + head;
    float *segments = args.segments + row * args.max_segments * kPartialColumns;
    if (is_row) {
        float *to = segments + task.segment * kPartialColumns;
#pragma unroll
        for (int f = 0; f < kDimGroups; ++f)
            *reinterpret_cast<float2 *>(to + f * 8 + 2 * q) =
                make_float2(state.values[f][0], state.values[f][1]);
        if (q == 0) *reinterpret_cast<float2 *>(to + kTileCols) = make_float2(state.max, state.sum);
    }
    fence_gpu();   // it is out before the ticket
    __syncwarp();  // of every lane
    unsigned *ticket = args.tickets + task.sequence * args.cache.num_kv_heads + task.kv_head;
    int is_last = 0;
    if (lane == 0) {
        is_last = atomicAdd(ticket, 1) == (unsigned)task.num_segments - 1;
        if (is_last) *ticket = 0;
    }
    is_last = __shfl_sync(kFullWarp, is_last, 0);
    fence_gpu();  // the other warps' segments after their tickets
    if (!is_last || !is_row) return;
#pragma unroll 1
    for (int i = 0; i < task.num_segments; ++i) {
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
            state = part;
        } else {
            state.fold(part);
        }
    }
    write_row(state, args, task, head);
}

static __global__ void __launch_bounds__(kThreads, 1)
    batch_attention_kernel(const __grid_constant__ AttentionArguments args) {
    extern __shared__ unsigned char raw[];
    __shared__ AttentionShared shared;
    int warp = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    if (lane < kSlots) barrier_init(shared_address(&shared.full[warp][lane]), 1);
    if (lane < kSlots) barrier_init_fence();
    let_next_kernel_start();
    wait_for_previous_kernel();
    deal_tasks(shared, args);
    uint32_t base = (shared_address(raw) + kAlignment - 1) / kAlignment * kAlignment;
    int group = args.num_heads / args.cache.num_kv_heads, num_tasks = shared.first_task[args.num_seqs];
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
    if (!source.take_task()) return;
#pragma unroll 1
    for (int i = 0; i < kSlots && source.has_piece(); ++i) source.copy_piece();
#pragma unroll 1
    for (int index = first; index < num_tasks; index += stride) {
        Task task = find_task(shared, args, index);
        bool is_row = g < group;
        int head = task.kv_head * group + (is_row ? g : 0);  // rows beyond repeat the first
        const bf16 *row = args.q + ((size_t)task.sequence * args.num_heads + head) * kTileCols;
        uint32_t query[kDimSteps][2];
#pragma unroll
        for (int s = 0; s < kDimSteps; ++s) {
            query[s][0] = load_pair(row + s * NUMERICS_STEP + 2 * q);
            query[s][1] = load_pair(row + s * NUMERICS_STEP + 2 * q + 8);
        }
        RowState state, tile_state;
#pragma unroll 1
        for (int i = 0; i < task.num_tiles; ++i) {
            attend_tile(tile_state, source, place, query, task.num_keys(task.first_tile + i), args.scale);
            if (i == 0) {
                state = tile_state;
            } else {
                state.fold(tile_state);
            }
        }
        if (task.num_segments > 1) {
            join_segments(state, args, task, head, is_row);
        } else if (is_row) {
            write_row(state, args, task, head);
        }
    }
}

Status launch_batch_attention(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    AttentionArguments args = {};
    args.cache = layer.cache;
    args.q = step.buffers.q;
    args.out = step.buffers.attn;
    args.seq_lens = step.seq_lens;
    args.block_tables = step.block_tables;
    args.tickets = step.buffers.tickets;
    args.segments = step.buffers.segments;
    args.max_blocks_per_seq = step.max_blocks_per_seq;
    args.num_seqs = step.num_seqs;
    args.num_heads = step.problem.num_heads;
    args.max_segments = step.max_segments;
    args.tile_tokens = step.tile_tokens;
    args.scale = (float)(1.4426950408889634074 / sqrt((double)kTileCols));
    return launch_chained(batch_attention_kernel, dim3((unsigned)step.num_multiprocessors), kThreads,
                          kRingBytes + kAlignment, 1, stream, args);
}
