// decode_batch_line.cuh -- how the attention of a decode batch is dealt out: arithmetic alone.
//
// The tiles of all rows -- a row is a sequence's keys for one kv head -- stand in one line: sequences, in
// each the kv heads, in each the tiles. A thread block takes a run of that line, the same number of tiles
// as any other but for its ends, which move on to where a row may be cut. So of the rows that start in a
// block the last alone can go on in others, and the results of rows that blocks share need a place per
// block and segment, whatever the lengths.
//
// See       tests/kernels/test_decode_batch_line.py, which needs no GPU

#pragma once
#include "../common/numerics.h"

__host__ __device__ inline int tiles_of(int length) {
    return (length + NUMERICS_TILE - 1) / NUMERICS_TILE;
}
__host__ __device__ inline int segments_of(int tiles) {
    return (tiles + NUMERICS_SEGMENT - 1) / NUMERICS_SEGMENT;
}

// The first position of a block's run of a line of `line` tiles, before it moves on; and the block in whose
// run, so counted, a position lies.
__host__ __device__ inline int run_start(int line, int block, int blocks) {
    return line / blocks * block + line % blocks * block / blocks;
}
__host__ __device__ inline int block_of(int line, int position, unsigned blocks) {
    return (int)((((long long)position + 1) * blocks - 1) / line);
}

// A row may be cut where a segment starts, but not before a last segment of less than half its keys: the
// first tile at or after `tile` at which it may, the row's end if there is none.
__host__ __device__ inline int next_cut(int tile, int length) {
    int segment = segments_of(tile);
    constexpr int kKeys = NUMERICS_TILE * NUMERICS_SEGMENT;
    int cuts = (length + kKeys / 2) / kKeys;
    return segment == 0 || segment < cuts ? segment * NUMERICS_SEGMENT : tiles_of(length);
}
