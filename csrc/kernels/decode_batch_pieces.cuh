// decode_batch_pieces.cuh -- how the attention of a decode batch deals out its work, and how a warp brings
// in the keys and values of its share.

#pragma once
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
    const BatchHeader *header;
    unsigned *tickets;
    float *segments;
    int num_heads, max_segments, tile_tokens;
    float scale;
};

struct AttentionShared {
    int first_task[kBatchMaxSeqs + 1];  // of each sequence; the last is the number of all
    int task_segments;                  // most segments of a task
    int lengths[kBatchMaxSeqs];
    int num_seqs, max_blocks_per_seq;
    const int32_t *block_tables;
    int warp_sums[kWarps];
    uint64_t full[kWarps][kSlots];
};

struct Task {
    int sequence, kv_head, length;
    int index, num_tasks;  // among the row's
    int first_tile, num_tiles;

    __device__ int num_segments() const { return (length + kSegmentKeys - 1) / kSegmentKeys; }
    // Keys of a tile, and the halves that hold some.
    __device__ int num_keys(int tile) const { return min(NUMERICS_TILE, length - tile * NUMERICS_TILE); }
    __device__ int halves(int tile) const { return (num_keys(tile) + kPieceKeys - 1) / kPieceKeys; }
};

// The sum of the values of this thread and those before it in the block.
static __device__ __forceinline__ int prefix_sum(AttentionShared &shared, int value) {
    int thread = (int)threadIdx.x, lane = thread % kWarp, sum = value;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        int below = __shfl_up_sync(kFullWarp, sum, offset);
        if (lane >= offset) sum += below;
    }
    if (lane == kWarp - 1) shared.warp_sums[thread / kWarp] = sum;
    __syncthreads();  // every warp's sum visible
    for (int i = 0; i < thread / kWarp; ++i) sum += shared.warp_sums[i];
    __syncthreads();  // they are read
    return sum;
}

// Every sequence's first task, by the whole block.
static __device__ __forceinline__ void deal_tasks(AttentionShared &shared, const AttentionArguments &args) {
    int thread = (int)threadIdx.x, heads = args.cache.num_kv_heads;
    static_assert(kThreads == kBatchMaxSeqs, "a thread per sequence");
    int length = args.header->lengths[thread];
    if (thread == 0) {
        shared.num_seqs = args.header->num_seqs;
        shared.max_blocks_per_seq = args.header->max_blocks_per_seq;
        shared.block_tables = args.header->block_tables;
        shared.first_task[0] = 0;
    }
    int segments = (length + kSegmentKeys - 1) / kSegmentKeys, warps = kWarps * (int)gridDim.x;
    int all_segments = prefix_sum(shared, segments);
    if (thread == kThreads - 1) shared.task_segments = max(1, (all_segments * heads + warps - 1) / warps);
    __syncthreads();  // the number is there
    int tasks = (segments + shared.task_segments - 1) / shared.task_segments * heads;
    shared.lengths[thread] = length;
    shared.first_task[thread + 1] = prefix_sum(shared, tasks);
    __syncthreads();  // the table is there
}

// Task number `number`; the sequence by bisection.
static __device__ __forceinline__ Task find_task(const AttentionShared &shared,
                                                 const AttentionArguments &args, int number) {
    int low = 0, high = shared.num_seqs - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (shared.first_task[middle] <= number) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Task task;
    int within = number - shared.first_task[low], heads = args.cache.num_kv_heads;
    int task_tiles = shared.task_segments * NUMERICS_SEGMENT;
    task.sequence = low;
    task.index = within / heads;
    task.kv_head = within - task.index * heads;
    task.length = shared.lengths[low];
    task.num_tasks = (task.num_segments() + shared.task_segments - 1) / shared.task_segments;
    task.first_tile = task.index * task_tiles;
    task.num_tiles = min(task_tiles, (task.length + NUMERICS_TILE - 1) / NUMERICS_TILE - task.first_tile);
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

    // False where there is no further task.
    __device__ __forceinline__ bool take_task() {
        if (next_task >= num_tasks) return false;
        task = find_task(shared, args, next_task);
        next_task += stride;
        tile = part = 0;
        look_up_blocks();
        return true;
    }
    // Of the segment that begins with the tile at hand.
    __device__ __forceinline__ void look_up_blocks() {
        int lane = (int)threadIdx.x % kWarp;
        int run_keys = min(kPieceKeys, args.cache.block_size);
        const int32_t *table = shared.block_tables + (size_t)task.sequence * shared.max_blocks_per_seq;
#pragma unroll
        for (int i = 0; i < kLaneBlocks; ++i) {
            int run = i * kWarp + lane, key = (task.first_tile + tile) * NUMERICS_TILE + run * run_keys;
            bool exists = run * run_keys < kSegmentKeys && key < task.length;
            blocks[i] = exists ? table[key / args.cache.block_size] : 0;
        }
    }
    __device__ __forceinline__ bool has_piece() const { return task.num_tiles > 0; }
    // Whether the piece at hand holds keys of earlier steps alone.
    __device__ __forceinline__ bool is_old() const {
        return (task.first_tile + tile) * NUMERICS_TILE + (part % 2 + 1) * kPieceKeys < task.length;
    }

    // Asks for the piece at hand and moves on.
    __device__ __forceinline__ void copy_piece() {
        int lane = (int)threadIdx.x % kWarp, block_size = args.cache.block_size;
        int half = part % 2, is_value = part / 2, absolute = task.first_tile + tile;
        int run_keys = min(kPieceKeys, block_size), runs = kPieceKeys / run_keys;
        int first_key = absolute * NUMERICS_TILE + half * kPieceKeys;
        int keys = min(kPieceKeys, task.length - first_key);
        int run = (tile % NUMERICS_SEGMENT * 2 + half) * runs + lane % runs;  // of the segment
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
        if (++tile < task.num_tiles) {
            if (tile % NUMERICS_SEGMENT == 0) look_up_blocks();
            return;
        }
        if (!take_task()) task.num_tiles = 0;
    }
};
