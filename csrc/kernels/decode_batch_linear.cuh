// decode_batch_linear.cuh -- what both linear kernels of a decode batch share: wgmma with the weights as
// its 64 rows and the tokens as its columns, fed by a ring of k tiles.
//
// A group is 64 weight rows, the work of one warpgroup. A stage holds kTiles neighbouring k tiles of a
// block's groups and tokens: of each strip of eight rows one contiguous run. One thread asks for it. With
// several ranks, rank r of a cluster takes chunks r, r + ranks, .. of K.

#pragma once
#include "../common/tensor_copy.cuh"
#include "../common/wgmma.cuh"
#include "decode_batch.cuh"

constexpr int kWarpgroup = 128;
// Of a thread, where two warpgroups multiply and a third has the producer: 128 x 40 + 256 x 232 are the
// multiprocessor's 65536.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
constexpr int kGroupRows = 64;
constexpr int kGroupStrips = kGroupRows / kStripRows;
constexpr int kStripBytes = kStripValues * (int)sizeof(bf16);
constexpr int kTilesPerChunk = NUMERICS_CHUNK / kTileCols;
constexpr int kMaxStages = 10;
constexpr int kAlignment = 1024;  // of a swizzled tile

template <int kTokens_, int kGroups_, int kTiles_>
struct StageShape {
    static constexpr int kTokens = kTokens_, kGroups = kGroups_, kTiles = kTiles_;
    static constexpr int kStripRun = kTiles * kStripBytes;
    static constexpr int kGroupRun = kGroupStrips * kStripRun;
    static constexpr int kTokenTileBytes = kTokens * kTileCols * (int)sizeof(bf16);
    static constexpr int kWeightBytes = kGroups * kGroupRun;
    static constexpr int kBytes = kWeightBytes + kTiles * kTokenTileBytes;
    static constexpr int kStagesPerChunk = kTilesPerChunk / kTiles;
};

struct Ring {
    uint32_t base;
    uint64_t *full, *empty;  // one of each per stage
    int num_stages;
};

// Where a walk through the ring stands.
struct RingPlace {
    int stage = 0, parity = 0;

    __device__ void advance(const Ring &ring) {
        stage = stage + 1 < ring.num_stages ? stage + 1 : 0;
        parity ^= stage == 0;
    }
};

__device__ __forceinline__ void init_ring(const Ring &ring, int num_consumer_warps) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < ring.num_stages; ++i) {
            barrier_init(shared_address(&ring.full[i]), 1);
            barrier_init(shared_address(&ring.empty[i]), num_consumer_warps);
        }
        barrier_init_fence();
    }
}

// The k tiles of a stage.
struct StageTiles {
    int first, count;
};

// The number of stages of one rank, and which k tiles its i-th holds; a stage does not cross a chunk.
template <typename Shape>
__host__ __device__ __forceinline__ int own_stages(int k_tiles, int rank, int num_ranks) {
    int chunks = (k_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
    if (rank >= chunks) return 0;
    int last = (chunks - 1 - rank) / num_ranks;  // of the rank's chunks
    int tiles = min(kTilesPerChunk, k_tiles - (last * num_ranks + rank) * kTilesPerChunk);
    return last * Shape::kStagesPerChunk + (tiles + Shape::kTiles - 1) / Shape::kTiles;
}
template <typename Shape>
__device__ __forceinline__ StageTiles tiles_of_stage(int i, int k_tiles, int rank, int num_ranks) {
    int chunk = i / Shape::kStagesPerChunk * num_ranks + rank;
    int first = chunk * kTilesPerChunk + i % Shape::kStagesPerChunk * Shape::kTiles;
    return {first, min(Shape::kTiles, k_tiles - first)};
}

// A group of weight rows: its matrix, and its first strip there. What lies beyond the matrix arrives as
// zeros.
struct GroupPlace {
    const CUtensorMap *matrix;
    int strip;
};

template <typename Shape>
static inline Status encode_group_map(CUtensorMap *map, const Matrix &weight) {
    return encode_strips_map(map, static_cast<const bf16 *>(weight.data), weight.rows, weight.cols,
                             kGroupStrips, Shape::kTiles);
}

// Weights into a stage, by one thread; the stage's tokens are expected too.
template <typename Shape, typename GroupPlaceOf>
static __device__ __forceinline__ void copy_weights(const Ring &ring, int stage, StageTiles tiles,
                                                    uint64_t policy, GroupPlaceOf place_of) {
    uint32_t full = shared_address(&ring.full[stage]), at = ring.base + stage * Shape::kBytes;
    barrier_arrive_expect(full, Shape::kWeightBytes + tiles.count * Shape::kTokenTileBytes);
#pragma unroll
    for (int g = 0; g < Shape::kGroups; ++g) {
        GroupPlace place = place_of(g);
        copy_box_3d_with_policy(at + g * Shape::kGroupRun, place.matrix, 0, tiles.first, place.strip, full,
                                policy);
    }
}

// A token tile's k tiles of a stage, from rows that lie one after another.
template <typename Shape>
static __device__ __forceinline__ void copy_tokens(const Ring &ring, int stage, const CUtensorMap *tokens,
                                                   int token_tile, StageTiles tiles) {
    uint32_t at = ring.base + stage * Shape::kBytes + Shape::kWeightBytes;
#pragma unroll
    for (int i = 0; i < Shape::kTiles; ++i) {
        if (i >= tiles.count) break;
        copy_box_2d(at + i * Shape::kTokenTileBytes, tokens, (tiles.first + i) * kTileCols,
                    token_tile * Shape::kTokens, shared_address(&ring.full[stage]));
    }
}

// A stage is read by this warp, which knows only of its own reads.
__device__ __forceinline__ void release_stage(const Ring &ring, int stage) {
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&ring.empty[stage]));
}

// One chunk of `count` k tiles by one warpgroup: acc becomes its chain, 64 rows x kTokens. Calls
// meanwhile(i) while the tensor cores have tile i to do.
template <typename Shape, typename Meanwhile>
static __device__ __forceinline__ void multiply_chunk(float (&acc)[Shape::kTokens / 2], const Ring &ring,
                                                      RingPlace &place, int group, int count,
                                                      Meanwhile meanwhile) {
    int previous = 0;
    for (int i = 0; i < count; ++i) {
        int tile = i % Shape::kTiles;
        if (tile == 0) barrier_wait(shared_address(&ring.full[place.stage]), place.parity);
        uint32_t at = ring.base + place.stage * Shape::kBytes;
        uint64_t weights =
            matrix_descriptor(at + group * Shape::kGroupRun + tile * kStripBytes, Shape::kStripRun);
        uint64_t tokens = matrix_descriptor(at + Shape::kWeightBytes + tile * Shape::kTokenTileBytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTileCols / NUMERICS_STEP; ++step) {
            uint64_t offset = (uint64_t)(step * NUMERICS_STEP * (int)sizeof(bf16) >> 4);
            wgmma_k16(acc, weights + offset, tokens + offset, i + step > 0);
        }
        wgmma_commit();
        meanwhile(i);
        wgmma_wait<1>();  // the previous tile is read: with it, perhaps, its stage
        if (tile == 0 && i > 0) release_stage(ring, previous);
        if (tile == Shape::kTiles - 1 || i == count - 1) {
            previous = place.stage;
            place.advance(ring);
        }
    }
    wgmma_wait<0>();
    release_stage(ring, previous);
}

// What lane (g, q) of warp w of a warpgroup holds in acc[4 f + e]: row 16 w + g + 8 (e / 2) of the group,
// token 8 f + 2 q + e % 2 of the tile.
__device__ __forceinline__ int held_row(int thread, int e) {
    return thread / kWarp * 16 + thread % kWarp / 4 + e / 2 * 8;
}
__device__ __forceinline__ int held_token(int thread, int f, int e) {
    return 8 * f + thread % 4 * 2 + e % 2;
}
