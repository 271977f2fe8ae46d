// kv_tile.cuh -- where a KV block's tiles lie in the pool of one layer.

#pragma once
#include "tile.cuh"

// Offset, in values, of the K tile of (block, head); the V tile follows it. A tile is block_size rows of 64
// values, swizzled as tile.cuh says. Block sizes are multiples of 16 and attention tiles start at multiples
// of 128, so a key's row has the same remainder by 8 in the cache and in an attention tile: a row may be
// copied chunk by chunk, its swizzle untouched.
__host__ __device__ inline size_t kv_tile_offset(int block, int head, int num_kv_heads, int block_size) {
    return ((size_t)block * num_kv_heads + head) * 2 * block_size * kTileCols;
}
