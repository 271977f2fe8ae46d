// decode_batch_pieces.cuh -- how the attention of a decode batch deals out its work, and how it brings
// in the keys and values of its share: the warps of a block take the tiles of its run
// (decode_batch_line.cuh) in turn, and one warp more copies for them.

#pragma once
#include "decode_batch.cuh"
#include "decode_batch_line.cuh"
#include "decode_batch_tile.cuh"

constexpr int kWarps = NUMERICS_SEGMENT;  // that compute; one more copies
constexpr int kConsumers = kWarps * kWarp;
constexpr int kThreads = kConsumers + kWarp;
constexpr int kSlots = 3;  // of a warp's ring: 192 KiB in all
constexpr int kPieceBytes = kPieceKeys * kKeyBytes;
constexpr int kRingBytes = kWarps * kSlots * kPieceBytes;
constexpr int kParts = 4;                           // pieces of a tile: K, K, V, V
constexpr int kSmallestBlock = 16;                  // tokens of a KV block
constexpr int kRuns = kPieceKeys / kSmallestBlock;  // most copies of a piece
constexpr int kAlignment = 1024;

// Rows of a step that prefills too: those of sequences with one new token.
struct MixedStep {
    const int32_t *cu_seqlens_q;  // null: a decode batch, row i being that of sequence i
    const int32_t *seq_lens;
    const int32_t *block_tables;
    int num_seqs;
    int max_blocks_per_seq;
};

struct AttentionArguments {
    KvLayer cache;
    const bf16 *q;
    bf16 *out;
    const BatchHeader *header;  // of a decode batch
    MixedStep mixed;
    unsigned *tickets;
    void *segments;  // [num_multiprocessors, max_segments] of StateBox; null: no row is cut
    int num_heads, max_segments;
    int block_shift;  // of the cache: log2 of its block size
    float scale;
};

// Place of a tile in the line. A row never starts beyond 2^31: its keys would not fit any card's memory.
struct TilePlace {
    int position;
    int sequence, kv_head, tile;
};

// What of it does not depend on the heads.
struct RunShared {
    int lengths[kBatchMaxSeqs];
    int max_blocks_per_seq;
    const int32_t *block_tables;
    int warp_sums[kWarps];
    int line;           // tiles of all rows
    TilePlace ends[2];  // of the block's run: its first tile, and the first that is not its
};

template <bool kPaired>
struct AttentionShared : RunShared {
    uint64_t full[kWarps][kSlots], empty[kWarps][kSlots];
    uint64_t sent[kWarps], taken[kWarps];  // of a warp's box
    StateBox<kPaired> boxes[kWarps];       // a row's open segment on its way to the next warp
    StateBox<kPaired> row;                 // its segments so far
};

// Keys of a sequence's row; 0: none.
static __device__ __forceinline__ int row_length(const AttentionArguments &args, int sequence) {
    const MixedStep &mixed = args.mixed;
    if (mixed.cu_seqlens_q == nullptr) return args.header->lengths[sequence];
    if (sequence >= mixed.num_seqs) return 0;
    bool is_decoding = mixed.cu_seqlens_q[sequence + 1] - mixed.cu_seqlens_q[sequence] == 1;
    return is_decoding ? mixed.seq_lens[sequence] : 0;
}

// The lengths and the ends of the block's run, by the whole block, a thread per sequence.
static __device__ __forceinline__ void deal_tiles(RunShared &shared, const AttentionArguments &args) {
    int thread = (int)threadIdx.x, lane = thread % kWarp, heads = args.cache.num_kv_heads;
    static_assert(kConsumers == kBatchMaxSeqs, "a thread per sequence");
    int length = thread < kBatchMaxSeqs ? row_length(args, thread) : 0;
    int tiles = tiles_of(length), before = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        int below = __shfl_up_sync(kFullWarp, before, offset);
        if (lane >= offset) before += below;
    }
    if (thread < kBatchMaxSeqs) {
        shared.lengths[thread] = length;
        if (lane == kWarp - 1) shared.warp_sums[thread / kWarp] = before;
    } else if (lane == 0) {
        bool is_mixed = args.mixed.cu_seqlens_q != nullptr;
        shared.max_blocks_per_seq =
            is_mixed ? args.mixed.max_blocks_per_seq : args.header->max_blocks_per_seq;
        shared.block_tables = is_mixed ? args.mixed.block_tables : args.header->block_tables;
    }
    __syncthreads();  // every warp's sum visible
    before -= tiles;
    int line = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
        int sum = shared.warp_sums[i];
        line += sum * heads;
        if (i < thread / kWarp) before += sum;
    }
    before *= heads;
    if (thread == 0) shared.line = line;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        int start = run_start(line, (int)blockIdx.x + i, (int)gridDim.x), within = start - before;
        if (start == line) {
            if (thread == 0) shared.ends[i] = {line, 0, 0, 0};
        } else if (within >= 0 && within < tiles * heads) {
            int kv_head = within / tiles, tile = within % tiles;
            int cut = args.segments != nullptr ? next_cut(tile, length) : tile > 0 ? tiles : 0;
            shared.ends[i] = {start + cut - tile, thread, kv_head, cut};
        }
    }
    __syncthreads();  // the run's ends are there
}

// A walk along the block's run.
struct TileCursor {
    const RunShared *shared;
    int num_kv_heads;
    TilePlace at;
    int length, num_tiles;  // of the row

    __device__ __forceinline__ TileCursor(const RunShared &run, int kv_heads, int first)
        : shared(&run), num_kv_heads(kv_heads), at(run.ends[0]) {
        enter_sequence();
        advance(first);
    }
    __device__ __forceinline__ void enter_sequence() {
        length = shared->lengths[at.sequence];
        num_tiles = tiles_of(length);
    }
    __device__ __forceinline__ bool is_valid() const { return at.position < shared->ends[1].position; }
    __device__ __forceinline__ void advance(int count) {
        at.position += count;
        at.tile += count;
        if (!is_valid()) return;
#pragma unroll 1
        while (at.tile >= num_tiles) {
            at.tile -= num_tiles;
            if (++at.kv_head < num_kv_heads) continue;
            at.kv_head = 0;
            ++at.sequence;
            enter_sequence();
        }
    }

    // Keys of the tile, and the halves that hold some.
    __device__ __forceinline__ int num_keys() const {
        return min(NUMERICS_TILE, length - at.tile * NUMERICS_TILE);
    }
    __device__ __forceinline__ int halves() const { return (num_keys() + kPieceKeys - 1) / kPieceKeys; }
    // The tiles of this row that are the block's.
    __device__ __forceinline__ int row_start() const { return at.position - at.tile; }
    __device__ __forceinline__ int first_own() const {
        return max(shared->ends[0].position - row_start(), 0);
    }
    __device__ __forceinline__ int end_own() const {
        return min(shared->ends[1].position - row_start(), num_tiles);
    }
};

// One warp copies for all others: kRuns lanes for each, a lane per copy of a piece, walk the pieces of that
// warp's tiles.
struct PieceSource {
    const RunShared &shared;
    const AttentionArguments &args;
    TileCursor cursor;
    uint32_t ring, full, empty;  // of the warp
    int run, run_keys;           // which of a piece's copies, and the keys of one
    uint64_t policy;
    int part, slot, parity;  // a fresh barrier's phase before the first counts as ended
    int blocks[2];           // of the lane's run of either half

    template <bool kPaired>
    __device__ __forceinline__ PieceSource(AttentionShared<kPaired> &block,
                                           const AttentionArguments &arguments, uint32_t rings)
        : shared(block),
          args(arguments),
          cursor(block, arguments.cache.num_kv_heads, (int)threadIdx.x % kWarp / kRuns) {
        int lane = (int)threadIdx.x % kWarp, warp = lane / kRuns;
        ring = rings + warp * kSlots * kPieceBytes;
        full = shared_address(block.full[warp]);
        empty = shared_address(block.empty[warp]);
        run = lane % kRuns;
        run_keys = min(kPieceKeys, args.cache.block_size);
        policy = evict_first_policy();  // a step's keys and values do not fit the cache in any case
        part = slot = 0;
        parity = 1;
        if (has_piece()) look_up_blocks();
    }
    __device__ __forceinline__ bool has_piece() const { return cursor.is_valid(); }
    __device__ __forceinline__ bool has_room() const {
        return barrier_is_over(empty + slot * (int)sizeof(uint64_t), parity);
    }
    // Whether the piece at hand holds keys of earlier steps alone.
    __device__ __forceinline__ bool is_old() const {
        return cursor.at.tile * NUMERICS_TILE + (part % 2 + 1) * kPieceKeys < cursor.length;
    }
    __device__ __forceinline__ void look_up_blocks() {
        const int32_t *table = shared.block_tables + (size_t)cursor.at.sequence * shared.max_blocks_per_seq;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int key = cursor.at.tile * NUMERICS_TILE + i * kPieceKeys + run * run_keys;
            bool exists = run * run_keys < kPieceKeys && key < cursor.length;
            blocks[i] = exists ? table[key >> args.block_shift] : 0;
        }
    }
    // Asks for the piece at hand and moves on.
    __device__ __forceinline__ void copy_piece() {
        int half = part % 2, is_value = part / 2, block_size = args.cache.block_size;
        int keys = min(kPieceKeys, cursor.num_keys() - half * kPieceKeys);
        int first_key = cursor.at.tile * NUMERICS_TILE + half * kPieceKeys + run * run_keys;
        int own_keys = min(run_keys, keys - run * run_keys);
        uint32_t barrier = full + slot * (int)sizeof(uint64_t);
        if (run == 0) barrier_arrive_expect(barrier, keys * kKeyBytes);
        if (own_keys > 0) {
            const bf16 *from = args.cache.data +
                               kv_tile_offset(half ? blocks[1] : blocks[0], cursor.at.kv_head,
                                              args.cache.num_kv_heads, block_size) +
                               ((first_key & (block_size - 1)) + (is_value ? block_size : 0)) * kTileCols;
            copy_bulk_with_policy(ring + slot * kPieceBytes + run * run_keys * kKeyBytes, from,
                                  own_keys * kKeyBytes, barrier, policy);
        }
        slot = slot + 1 < kSlots ? slot + 1 : 0;
        parity ^= slot == 0;
        ++part;
        if (part % 2 == 1 && cursor.halves() == 1) ++part;
        if (part < kParts) return;
        part = 0;
        cursor.advance(kWarps);
        if (has_piece()) look_up_blocks();
    }
};

// Keys and values of earlier steps first, then, with the previous kernel at its end, all others, each as
// soon as its slot is free.
template <bool kPaired>
static __device__ __forceinline__ void copy_pieces(AttentionShared<kPaired> &shared,
                                                   const AttentionArguments &args, uint32_t rings) {
    PieceSource source(shared, args, rings);
    bool has_waited = false;
#pragma unroll 1
    while (__any_sync(kFullWarp, source.has_piece())) {
        bool may_copy = source.has_piece() && (has_waited || source.is_old()) && source.has_room();
        if (!has_waited && !__any_sync(kFullWarp, may_copy)) {
            wait_for_previous_kernel();
            has_waited = true;
        }
        if (may_copy) source.copy_piece();
        __syncwarp();
    }
}
