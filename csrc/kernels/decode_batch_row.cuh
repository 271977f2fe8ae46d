// decode_batch_row.cuh -- how the attention of a decode batch puts a row together: a segment's state goes from
// warp to warp of a block, and segments of a row that blocks share meet in memory.

#pragma once
#include "decode_batch_pieces.cuh"

// A warp's part in handing states on: its own box, which the warp before it fills, and the next warp's. A
// fresh barrier's phase before the first counts as ended.
template <bool kPaired>
struct Relay {
    AttentionShared<kPaired> &shared;
    int warp, next;
    int receive_parity, send_parity;

    __device__ __forceinline__ Relay(AttentionShared<kPaired> &block_shared, int own_warp)
        : shared(block_shared),
          warp(own_warp),
          next((own_warp + 1) % kWarps),
          receive_parity(0),
          send_parity(1) {}

    __device__ __forceinline__ void await_turn() {
        barrier_wait(shared_address(&shared.sent[warp]), receive_parity);
        receive_parity ^= 1;
    }
    __device__ __forceinline__ void give_box_back() { barrier_arrive(shared_address(&shared.taken[warp])); }
    __device__ __forceinline__ void send(const RowState &state) {
        barrier_wait(shared_address(&shared.taken[next]), send_parity);
        send_parity ^= 1;
        shared.boxes[next].store(state);
        barrier_arrive(shared_address(&shared.sent[next]));
    }
};

// Whether nothing of the row is missing now that `added` of its segments are there.
static __device__ __forceinline__ bool completes_row(unsigned *ticket, int added, int num_segments) {
    fence_gpu();   // this lane's segments are out before the ticket, and those of whom it had the turn from
    __syncwarp();  // and every lane's
    int is_last = 0;
    if (threadIdx.x % kWarp == 0) {
        is_last = atomicAdd(ticket, (unsigned)added) == (unsigned)(num_segments - added);
        if (is_last) *ticket = 0;
    }
    is_last = __shfl_sync(kFullWarp, is_last, 0);
    fence_gpu();  // the other blocks' segments after their tickets
    return is_last;
}

// A row that blocks share. Its place in memory is that of the block with its first tile, whose part of the
// row is one result, at that part's last segment; of the others every segment is one.
template <bool kPaired>
struct SharedRow {
    StateBox<kPaired> *segments;
    unsigned *ticket;
    int first_stored, num_segments;

    __device__ __forceinline__ SharedRow(const AttentionArguments &args, int line,
                                         const TileCursor &cursor) {
        int block = block_of(line, cursor.row_start(), gridDim.x);
        segments = static_cast<StateBox<kPaired> *>(args.segments) + (size_t)block * args.max_segments;
        ticket = args.tickets + block;
        first_stored = segments_of(run_start(line, block + 1, (int)gridDim.x) - cursor.row_start()) - 1;
        num_segments = segments_of(cursor.num_tiles);
    }
    // With this block's part complete: whether the row is, and then the row.
    __device__ __forceinline__ bool finish(RowState &row, const TileCursor &cursor) const {
        int added = segments_of(cursor.end_own()) - segments_of(cursor.first_own());
        if (!completes_row(ticket, added, num_segments)) return false;
        segments[first_stored].load_far(row);
#pragma unroll 1
        for (int i = first_stored + 1; i < num_segments; ++i) {
            RowState next;
            segments[i].load_far(next);
            fold(row, row, next);
        }
        return true;
    }
};
