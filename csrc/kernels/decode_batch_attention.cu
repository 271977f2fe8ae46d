// decode_batch_attention.cu -- attention of a decode batch: a row's state goes from warp to warp.
//
//   out[t, h] = fold of segments, ascending, of folds of tiles, ascending
//
// Shapes    q, out [num_seqs, num_heads, 64]
// Rounding  docs/numerics.md section 4
// Mapping   persistent; a thread block takes a run of the line of all tiles (decode_batch_line.cuh), its
//           eight warps the run's tiles in turn; a ninth copies K and V into a ring for each, ahead of
//           their work. A warp folds its tile into what the warp before it hands over of the same segment
//           and hands the result on. Of a row that blocks share, the last to finish folds the segments
// Cost      256 bytes per key and kv head: memory-bound
// See       decode_batch_tile.cuh, twin/attention.c, tests/kernels/test_bits_decode_batch.py

#include <math.h>

#include "decode_batch_row.cuh"
#include "decoding_rows.cuh"

// Fewer rows leave most multiprocessors idle, as no row is cut: attention_decode.cu's clusters do not.
constexpr int kFewestDecodingRows = 9;

// Where the warp's work stands in its ring.
struct PiecePlace {
    uint32_t ring, full, empty;
    int slot = 0, parity = 0;

    __device__ __forceinline__ uint32_t await() const {
        barrier_wait(full + slot * (int)sizeof(uint64_t), parity);
        return ring + slot * kPieceBytes;
    }
    // The piece is read: its slot may take another.
    __device__ __forceinline__ void give_back() {
        barrier_arrive(empty + slot * (int)sizeof(uint64_t));
        slot = slot + 1 < kSlots ? slot + 1 : 0;
        parity ^= slot == 0;
    }
};

// The row's columns of heads that this lane loads and writes: g, and whether it is one.
template <bool kPaired>
struct LaneHead {
    int group, index;
    bool exists;

    __device__ __forceinline__ explicit LaneHead(const AttentionArguments &args)
        : group(args.num_heads / args.cache.num_kv_heads), index((int)threadIdx.x % kWarp / 4) {
        exists = index < group;
    }
    static __device__ __forceinline__ size_t row_of(const AttentionArguments &args, int sequence) {
        const int32_t *rows = args.mixed.cu_seqlens_q;
        return (size_t)(rows == nullptr ? sequence : rows[sequence]);
    }
    __device__ __forceinline__ void load_query(uint32_t (&query)[kDimSteps][2],
                                               const AttentionArguments &args, const TilePlace &at) const {
        int column = index % (kPaired ? kPairedHeads : kMaxGroup);  // those that are none repeat the first
        size_t row =
            row_of(args, at.sequence) * args.num_heads + at.kv_head * group + (column < group ? column : 0);
        const bf16 *from = args.q + row * kTileCols + threadIdx.x % 4 * 2;
#pragma unroll
        for (int s = 0; s < kDimSteps; ++s) {
            query[s][0] = load_pair(from + s * NUMERICS_STEP);
            query[s][1] = load_pair(from + s * NUMERICS_STEP + 8);
        }
    }
    __device__ __forceinline__ void write(const RowState &state, const AttentionArguments &args,
                                          const TilePlace &at) const {
        float inverse[2] = {__frcp_rn(state.sum[0]), __frcp_rn(state.sum[1])};
        size_t row = row_of(args, at.sequence) * args.num_heads + at.kv_head * group + index;
        bf16 *to = args.out + row * kTileCols + threadIdx.x % 4 * 2;
#pragma unroll
        for (int c = 0; c < kChunksPerRow; ++c) {
            const float (&values)[4] = state.values[c / 2];
            uint32_t pair = transpose_matrix(pack_bf16(__fmul_rn(values[c % 2 * 2], inverse[0]),
                                                       __fmul_rn(values[c % 2 * 2 + 1], inverse[1])));
            if (exists) *reinterpret_cast<uint32_t *>(to + c * kChunkValues) = pair;
        }
    }
};

// `after_scores` is called when the query is no longer needed.
template <bool kPaired, typename AfterScores>
static __device__ __forceinline__ void attend_tile(RowState &state, PiecePlace &place,
                                                   const uint32_t (&query)[kDimSteps][2], int num_keys,
                                                   float scale, AfterScores after_scores) {
    TileScores<kPaired> scores;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (half * kPieceKeys >= num_keys) continue;
        scores.score_half(half, query, place.await());
        place.give_back();
    }
    after_scores();
    if (num_keys < NUMERICS_TILE) scores.mask(num_keys);
    uint32_t weights[kKeySteps][2];
    soften<kPaired>(weights, state, scores, scale);
#pragma unroll
    for (int f = 0; f < kDimTiles; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state.values[f][i] = 0.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int keys = num_keys - half * kPieceKeys;
        if (keys <= 0) continue;
        uint32_t rows = place.await();
        if (keys < kPieceKeys) clear_rows(rows, keys);
        weigh_half(state, half, weights, rows);
        place.give_back();
    }
}

// One tile's result folded into its row and handed on.
template <bool kPaired>
static __device__ __forceinline__ void join_row(RowState &state, const AttentionArguments &args,
                                                AttentionShared<kPaired> &shared, const TileCursor &cursor,
                                                Relay<kPaired> &relay, const LaneHead<kPaired> &head) {
    int tile = cursor.at.tile, first = cursor.first_own(), end = cursor.end_own();
    bool ends_part = tile == end - 1, is_shared = first > 0 || end < cursor.num_tiles;
    bool ends_segment = ends_part || tile % NUMERICS_SEGMENT == NUMERICS_SEGMENT - 1;
    bool in_segment = tile % NUMERICS_SEGMENT > 0;
    // Where a segment starts, nothing but the turn is handed over. It guards the row's box too: when the
    // next row's first segment ends, every warp has had one of its tiles.
    if (tile > first) relay.await_turn();
    RowState before;
    if (in_segment) {
        shared.boxes[relay.warp].load(before);
        fold(state, before, state);
    }
    if (ends_segment && first == 0 && tile >= NUMERICS_SEGMENT) {
        shared.row.load(before);
        fold(state, before, state);
    }
    if (tile > first) relay.give_box_back();
    if (!ends_part) {
        if (ends_segment && first == 0) shared.row.store(state);
        if (ends_segment && first > 0)
            SharedRow<kPaired>(args, shared.line, cursor).segments[tile / NUMERICS_SEGMENT].store(state);
        relay.send(state);
        return;
    }
    if (is_shared) {
        SharedRow<kPaired> row(args, shared.line, cursor);
        row.segments[tile / NUMERICS_SEGMENT].store(state);
        if (!row.finish(state, cursor)) return;
    }
    head.write(state, args, cursor.at);
}

template <bool kPaired>
static __device__ __forceinline__ void consume(AttentionShared<kPaired> &shared,
                                               const AttentionArguments &args, uint32_t rings) {
    int warp = (int)threadIdx.x / kWarp;
    TileCursor cursor(shared, args.cache.num_kv_heads, warp);
    PiecePlace place;
    place.ring = rings + warp * kSlots * kPieceBytes;
    place.full = shared_address(shared.full[warp]);
    place.empty = shared_address(shared.empty[warp]);
    LaneHead<kPaired> head(args);
    Relay<kPaired> relay(shared, warp);
    uint32_t query[kDimSteps][2];
    wait_for_previous_kernel();
    if (cursor.is_valid()) head.load_query(query, args, cursor.at);
#pragma unroll 1
    while (cursor.is_valid()) {
        TileCursor next = cursor;
        next.advance(kWarps);
        RowState state;
        attend_tile<kPaired>(state, place, query, cursor.num_keys(), args.scale, [&]() {
            if (next.is_valid()) head.load_query(query, args, next.at);
        });
        join_row(state, args, shared, cursor, relay, head);
        cursor = next;
    }
}

template <bool kPaired>
static __global__ void __launch_bounds__(kThreads, 1)
    batch_attention_kernel(const __grid_constant__ AttentionArguments args) {
    extern __shared__ unsigned char raw[];
    __shared__ AttentionShared<kPaired> shared;
    int thread = (int)threadIdx.x;
    if (thread < kWarps * kSlots) {
        barrier_init(shared_address(&shared.full[0][thread]), 1);
        barrier_init(shared_address(&shared.empty[0][thread]), kWarp);
        if (thread < kWarps) barrier_init(shared_address(&shared.sent[thread]), kWarp);
        if (thread < kWarps) barrier_init(shared_address(&shared.taken[thread]), kWarp);
        barrier_init_fence();
    }
    let_next_kernel_start();
    // The kernel before this one let it start after its own wait: the header is there, and the keys and
    // values of earlier steps.
    deal_tiles(shared, args);
    uint32_t rings = (shared_address(raw) + kAlignment - 1) / kAlignment * kAlignment;
    if (thread >= kConsumers) {
        copy_pieces(shared, args, rings);
    } else {
        consume(shared, args, rings);
    }
}

size_t batch_partial_bytes(int group) {
    return group <= kPairedHeads ? sizeof(StateBox<true>) : sizeof(StateBox<false>);
}

static Status launch(AttentionArguments &args, const KvLayer &cache, int num_heads, int num_blocks,
                     cudaStream_t stream) {
    args.cache = cache;
    args.num_heads = num_heads;
    args.scale = (float)(1.4426950408889634074 / sqrt((double)kTileCols));
    args.block_shift = 0;
    while (1 << args.block_shift < cache.block_size) ++args.block_shift;
    bool is_paired = num_heads / cache.num_kv_heads <= kPairedHeads;
    return launch_chained(is_paired ? batch_attention_kernel<true> : batch_attention_kernel<false>,
                          dim3((unsigned)num_blocks), kThreads, kRingBytes + kAlignment, 1, stream, args);
}

Status launch_batch_attention(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    AttentionArguments args = {};
    args.q = step.buffers.q;
    args.out = step.buffers.attn;
    args.header = step.buffers.header;
    args.tickets = step.buffers.tickets;
    args.segments = step.buffers.segments;
    args.max_segments = step.max_segments;
    return launch(args, layer.cache, step.problem.num_heads, step.num_multiprocessors, stream);
}

bool serves_decoding_rows(const KvLayer &cache, const BatchIndex &batch, int num_heads) {
    int num_rows = batch.num_seqs - batch.num_prefill_seqs;
    return batch.prefill_seqs != nullptr && num_rows >= kFewestDecodingRows &&
           batch.num_seqs <= kBatchMaxSeqs && num_heads / cache.num_kv_heads <= kMaxGroup;
}

Status launch_decoding_rows(bf16 *out, const bf16 *q, const KvLayer &cache, const BatchIndex &batch,
                            int num_heads, cudaStream_t stream) {
    int device = 0, num_blocks = 0;
    TRY(CUDA_STATUS(cudaGetDevice(&device)));
    TRY(CUDA_STATUS(cudaDeviceGetAttribute(&num_blocks, cudaDevAttrMultiProcessorCount, device)));
    AttentionArguments args = {};
    args.q = q;
    args.out = out;
    args.mixed = {batch.cu_seqlens_q, batch.seq_lens, batch.block_tables, batch.num_seqs,
                  batch.max_blocks_per_seq};
    return launch(args, cache, num_heads, num_blocks, stream);
}
