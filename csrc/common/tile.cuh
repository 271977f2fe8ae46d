// tile.cuh -- where a value lies inside a tile: the one layout that copies, ldmatrix and wgmma all accept.
//
// A tile row is 64 bf16 values, 128 bytes, eight chunks of 16 bytes. Chunk c of row r is stored at place
// c ^ (r % 8): the 128-byte swizzle of the tensor cores' shared-memory descriptors, under which the eight
// rows of one chunk column lie in eight different bank groups. Weights are cut into strips of eight rows by
// 64 columns, 1 KiB; the strips of the same eight rows follow each other, so that eight rows by any run of
// columns are contiguous. A KV block is one K tile and one V tile of block_size rows per kv head.

#pragma once
#include <stddef.h>
#include <stdint.h>

constexpr int kTileCols = 64;                         // values of a tile row
constexpr int kStripRows = 8;                         // rows of a weight strip
constexpr int kStripValues = kStripRows * kTileCols;  // 1 KiB
constexpr int kPaddedRows = 64;  // weights are padded with zero rows to multiples of this
constexpr int kChunkValues = 8;  // values of a chunk, 16 bytes
constexpr int kChunksPerRow = kTileCols / kChunkValues;

__host__ __device__ inline int num_tiles(int length) {
    return (length + kTileCols - 1) / kTileCols;
}

// Offset, in values, of a chunk inside its tile.
__host__ __device__ inline int tile_offset(int row, int chunk) {
    return row * kTileCols + ((chunk ^ (row % 8)) * kChunkValues);
}

// Offset, in values, of chunk `chunk` (of 8 columns) of row `row` in a packed weight of `cols` columns.
__host__ __device__ inline size_t packed_offset(int row, int chunk, int cols) {
    size_t strip = (size_t)(row / kStripRows) * num_tiles(cols) + chunk / kChunksPerRow;
    return strip * kStripValues + tile_offset(row % kStripRows, chunk % kChunksPerRow);
}

__host__ __device__ inline int padded_rows(int rows) {
    return (rows + kPaddedRows - 1) / kPaddedRows * kPaddedRows;
}
