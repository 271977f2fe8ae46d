// linear_many.cuh -- tiles of 128 tokens by 128 weight rows: what linear layers for many tokens share.
//
//   sum[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// What becomes of the sums is the Operation's: where the weight rows of a tile come from, and what is
// written. A thread block takes tile after tile. One thread of it asks the copy engine for k tiles of 64,
// which arrive in a ring in shared memory; two warpgroups multiply 64 tokens each.
//
// An Operation has
//   kParts        a tile's rows are as many runs of rows, of up to three matrices
//   part(tile, p) matrix and first row of run p of a tile
//   take(..)      takes the sums of one warp's 16 tokens: sum[4 i + e] is element e of mma_m16n8k16's d for
//                 columns 8 i .. 8 i + 7; true if it staged them, rounded, to be written later
//   kUnits, write(unit, ..) what is staged is written in so many parts, between the next tile's products,
//   so
//                 that the tensor cores have work meanwhile

#pragma once
#include "../common/launch.cuh"
#include "../common/numerics.h"
#include "../common/ptx.cuh"
#include "../common/tensor_copy.cuh"
#include "../common/vector.cuh"
#include "../common/wgmma.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kManyThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kProducerRegisters = 40;  // per thread; 128 x 40 + 256 x 232 are the multiprocessor's 65536
constexpr int kConsumerRegisters = 232;
constexpr int kConsumerTokens = 64;  // rows of one wgmma
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kWarpTokens = 16;
constexpr int kBlockTokens = kConsumers * kConsumerTokens;
constexpr int kBlockRows = 128;                                   // columns of one wgmma
constexpr int kSums = kConsumerTokens * kBlockRows / kWarpgroup;  // of a thread
constexpr int kBandTiles = 16;  // token tiles taken together before the next: weights and tokens stay in L2
constexpr int kTileRowBytes = kTileCols * (int)sizeof(bf16);
constexpr int kTokenTileBytes = kBlockTokens * kTileRowBytes;
constexpr int kStageBytes = kTokenTileBytes + kBlockRows * kTileRowBytes;
constexpr int kTilesPerChunk = NUMERICS_CHUNK / kTileCols;
constexpr int kStepsPerTile = kTileCols / NUMERICS_STEP;
constexpr int kStepBytes = NUMERICS_STEP * (int)sizeof(bf16);
constexpr int kMaxMatrices = 3;
constexpr int kRowChunks = kBlockRows / kChunkValues;
constexpr int kStagingPitch = kBlockRows * (int)sizeof(bf16) + 16;
constexpr int kStagingBytes = kConsumerWarps * kWarpTokens * kStagingPitch;
constexpr int kStages = 5;
constexpr int kAlignment = 1024;  // of a swizzled tile
constexpr int kSharedBytes = kStages * kStageBytes + kStagingBytes + kAlignment;

struct ManyMaps {
    CUtensorMap tokens;
    CUtensorMap weights[kMaxMatrices];
};

struct ManyTiles {
    int num_tokens;
    int k_tiles;
    int token_tiles;
    int row_tiles;
};

struct PartPlace {
    int matrix;
    int row;
};

// One warp's share of a tile: 16 tokens, and room to turn fragments into rows.
struct WarpTile {
    unsigned char *staging;  // 16 rows
    int pitch;               // bytes from row to row: a fragment's rows in different banks
    int first_token;
    int num_tokens;  // of the step
    int row_tile;
    int lane;
};

// `full` counts the producer and the bytes; `empty` every warp that reads them.
struct ManyBarriers {
    uint64_t full[kStages];
    uint64_t empty[kStages];
};

struct TilePlace {
    int token_tile;
    int row_tile;
};

static __device__ __forceinline__ TilePlace tile_place(const ManyTiles &tiles, int index) {
    int band = index / (kBandTiles * tiles.row_tiles), rest = index % (kBandTiles * tiles.row_tiles);
    int width = min(kBandTiles, tiles.token_tiles - band * kBandTiles);
    return {band * kBandTiles + rest % width, rest / width};
}

// Two neighbouring fragments, 16 columns from `column` on, as pairs of bf16: rows group and group + 8 of
// each.
static __device__ __forceinline__ void stage_fragments(const WarpTile &tile, int column, uint32_t low0,
                                                       uint32_t high0, uint32_t low1, uint32_t high1) {
    int row = tile.lane % 16, chunk = column / kChunkValues + tile.lane / 16;
    store_matrix_x4(shared_address(tile.staging) + row * tile.pitch + chunk * 16, low0, high0, low1, high1);
}

// All the sums of a warp's tile, rounded.
template <int kCount>
static __device__ __forceinline__ void stage_sums(const float (&sum)[kCount], const WarpTile &tile) {
#pragma unroll
    for (int i = 0; i < kCount; i += 8) {
        stage_fragments(tile, 2 * i, pack_bf16(sum[i], sum[i + 1]), pack_bf16(sum[i + 2], sum[i + 3]),
                        pack_bf16(sum[i + 4], sum[i + 5]), pack_bf16(sum[i + 6], sum[i + 7]));
    }
}

// 16 bytes of a staged row.
static __device__ __forceinline__ uint4 *staged(const WarpTile &tile, int row, int chunk) {
    return reinterpret_cast<uint4 *>(tile.staging + row * tile.pitch + chunk * 16);
}

template <typename Operation>
static __device__ __forceinline__ void produce(uint32_t ring, ManyBarriers &barriers, const ManyMaps &maps,
                                               const ManyTiles &tiles, const Operation &operation) {
    constexpr int kPartBytes = kBlockRows / Operation::kParts * kTileRowBytes;
    int stage = 0, parity = 1;  // the first turn of the ring waits for nobody
    for (int index = blockIdx.x; index < tiles.token_tiles * tiles.row_tiles; index += gridDim.x) {
        TilePlace place = tile_place(tiles, index);
        PartPlace parts[Operation::kParts];
#pragma unroll
        for (int p = 0; p < Operation::kParts; ++p) parts[p] = operation.part(place.row_tile, p);
        for (int k_tile = 0; k_tile < tiles.k_tiles; ++k_tile) {
            uint32_t full = shared_address(&barriers.full[stage]), at = ring + stage * kStageBytes;
            barrier_wait(shared_address(&barriers.empty[stage]), parity);
            barrier_arrive_expect(full, kStageBytes);
            copy_box_2d(at, &maps.tokens, k_tile * kTileCols, place.token_tile * kBlockTokens, full);
#pragma unroll
            for (int p = 0; p < Operation::kParts; ++p) {
                copy_box_3d(at + kTokenTileBytes + p * kPartBytes, &maps.weights[parts[p].matrix], 0,
                            k_tile, parts[p].row / kStripRows, full);
            }
            stage = stage + 1 < kStages ? stage + 1 : 0;
            parity ^= stage == 0;
        }
    }
}

// Where a consumer is in the ring; goes on from tile to tile.
struct RingPlace {
    int stage = 0;
    int parity = 0;
};

// Computes 64 tokens x 128 rows into `sum`; calls meanwhile() while the tensor cores work.
template <typename Meanwhile>
static __device__ __forceinline__ void consume(float (&sum)[kSums], uint32_t ring, ManyBarriers &barriers,
                                               int k_tiles, int consumer, int lane, RingPlace &place,
                                               Meanwhile meanwhile) {
    // A warp knows only that its own reads are over.
    auto release = [&](int stage) {
        if (lane == 0) barrier_arrive(shared_address(&barriers.empty[stage]));
    };
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = -0.0f;  // adding it changes no bit
    for (int first_tile = 0; first_tile < k_tiles; first_tile += kTilesPerChunk) {
        float acc[kSums];
        int count = min(kTilesPerChunk, k_tiles - first_tile), previous = 0;
        for (int i = 0; i < count; ++i) {
            barrier_wait(shared_address(&barriers.full[place.stage]), place.parity);
            uint32_t at = ring + place.stage * kStageBytes;
            uint64_t tokens = matrix_descriptor(at + consumer * kConsumerTokens * kTileRowBytes);
            uint64_t weights = matrix_descriptor(at + kTokenTileBytes);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kStepsPerTile; ++step) {
                uint64_t offset = (uint64_t)(step * kStepBytes >> 4);
                wgmma_k16(acc, tokens + offset, weights + offset, i + step > 0);
            }
            wgmma_commit();
            meanwhile();
            wgmma_wait<1>();  // the previous tile is read: its stage may be filled again
            if (i > 0) release(previous);
            previous = place.stage;
            place.stage = place.stage + 1 < kStages ? place.stage + 1 : 0;
            place.parity ^= place.stage == 0;
        }
        wgmma_wait<0>();
        release(previous);
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] = __fadd_rn(sum[i], acc[i]);
    }
}

template <typename Operation>
static __global__ void __launch_bounds__(kManyThreads, 1)
    linear_many_kernel(const __grid_constant__ ManyMaps maps, ManyTiles tiles, Operation operation) {
    extern __shared__ unsigned char shared[];
    __shared__ ManyBarriers barriers;
    uint32_t base = shared_address(shared);
    uint32_t ring = (base + kAlignment - 1) / kAlignment * kAlignment;
    unsigned char *staging = shared + (ring - base) + kStages * kStageBytes;
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warpgroup = threadIdx.x / kWarpgroup;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(shared_address(&barriers.full[i]), 1);
            barrier_init(shared_address(&barriers.empty[i]), kConsumerWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();  // the barriers are initialised before anyone arrives or waits
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (warpgroup == 0) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce(ring, barriers, maps, tiles, operation);
    } else {
        take_registers<kConsumerRegisters>();
        int consumer_warp = warp - kWarpgroup / kWarp;
        RingPlace ring_place;
        WarpTile tile = {staging + consumer_warp * kWarpTokens * kStagingPitch,
                         kStagingPitch,
                         0,
                         tiles.num_tokens,
                         0,
                         lane};
        int unit = Operation::kUnits;  // of the tile before, the next to write
        auto write_unit = [&] {
            if (unit < Operation::kUnits) operation.write(unit++, tile);
        };
        for (int index = blockIdx.x; index < tiles.token_tiles * tiles.row_tiles; index += gridDim.x) {
            TilePlace place = tile_place(tiles, index);
            float sum[kSums];
            consume(sum, ring, barriers, tiles.k_tiles, warpgroup - 1, lane, ring_place, write_unit);
            while (unit < Operation::kUnits) write_unit();
            __syncwarp();  // what was staged is written
            tile.first_token = place.token_tile * kBlockTokens + consumer_warp * kWarpTokens;
            tile.row_tile = place.row_tile;
            unit = operation.take(sum, tile) ? 0 : Operation::kUnits;
            __syncwarp();  // every lane's sums are staged
        }
        while (unit < Operation::kUnits) write_unit();
    }
}

// What a launch multiplies: x [num_tokens, cols] with the rows of one to three packed matrices.
struct ManyOperands {
    const bf16 *x;
    int num_tokens;
    const Matrix *weights[kMaxMatrices];
    int num_weights;
};

// The maps and tiles of a launch; each part of a tile's weight rows is one box.
static inline Status prepare_many(ManyMaps *maps, ManyTiles *tiles, int *num_multiprocessors,
                                  const ManyOperands &operands, int num_parts) {
    int cols = operands.weights[0]->cols, rows = 0, device;
    TRY(encode_rows_map(&maps->tokens, operands.x, operands.num_tokens, cols, kBlockTokens));
    for (int i = 0; i < operands.num_weights; ++i) {
        const Matrix *weight = operands.weights[i];
        TRY(encode_strips_map(&maps->weights[i], static_cast<const bf16 *>(weight->data), weight->rows,
                              cols, kBlockRows / num_parts / kStripRows));
        rows += weight->rows;
    }
    *tiles = {operands.num_tokens, num_tiles(cols), (operands.num_tokens + kBlockTokens - 1) / kBlockTokens,
              (rows + kBlockRows - 1) / kBlockRows};
    TRY(CUDA_STATUS(cudaGetDevice(&device)));
    return CUDA_STATUS(cudaDeviceGetAttribute(num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
}

template <typename Operation>
static Status launch_tiles(const Operation &operation, const ManyMaps &maps, const ManyTiles &tiles,
                           int num_multiprocessors, cudaStream_t stream) {
    int num_blocks = min(tiles.token_tiles * tiles.row_tiles, num_multiprocessors);
    return launch_chained(linear_many_kernel<Operation>, dim3((unsigned)num_blocks), kManyThreads,
                          kSharedBytes, 1, stream, maps, tiles, operation);
}

template <typename Operation>
static Status launch_many(const Operation &operation, const ManyOperands &operands, cudaStream_t stream) {
    ManyMaps maps = {};
    ManyTiles tiles;
    int num_multiprocessors;
    TRY(prepare_many(&maps, &tiles, &num_multiprocessors, operands, Operation::kParts));
    return launch_tiles(operation, maps, tiles, num_multiprocessors, stream);
}
