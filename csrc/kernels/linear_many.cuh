// linear_many.cuh -- tiles of 128 tokens by 128 weight rows: the kernel of linear layers for many tokens.
//
//   sum[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// What becomes of the sums is the Operation's: where the weight rows of a tile come from, and what is
// written. A thread block takes tile after tile, through the ring of linear_ring.cuh.
//
// An Operation has
//   kParts           a tile's rows are as many runs of rows, of up to three matrices
//   part(tile, p)    matrix and first row of run p of a tile
//   take(sum, tile)  takes the sums of one warp's 16 tokens: sum[4 i + e] is element e of mma_m16n8k16's d
//                    for columns 8 i .. 8 i + 7; true if it staged them, rounded, to be written later
//   kUnits           what is staged is written in so many units, between the next tile's products, so that
//                    the tensor cores have work meanwhile
//   Fetched          what a unit needs from global memory: asked for one unit ahead
//   fetch(unit, tile), write(unit, tile, fetched)

#pragma once
#include "linear_ring.cuh"

constexpr int kWarpTokens = 16;
constexpr int kBandTiles = 16;  // token tiles taken together before the next: weights and tokens stay in L2
constexpr int kRowChunks = kBlockRows / kChunkValues;
constexpr int kStagingPitch = kBlockRows * (int)sizeof(bf16) + 16;
constexpr int kStagingBytes = kConsumerWarps * kWarpTokens * kStagingPitch;
constexpr int kStages = 6;  // as many as there is room for
constexpr int kBarriersAt = kStages * kStageBytes + kStagingBytes;
constexpr int kSharedBytes = kBarriersAt + (int)sizeof(RingBarriers<kStages>);

// One warp's share of a tile: 16 tokens, and room to turn fragments into rows.
struct WarpTile {
    unsigned char *staging;  // 16 rows
    int rows;                // weight rows of the tile, a compile-time constant
    int first_token;
    int num_tokens;  // of the step
    int row_tile;
    int lane;

    // Bytes from row to row: a fragment's rows lie in different banks.
    __device__ __forceinline__ int pitch() const { return rows * (int)sizeof(bf16) + 16; }
    __device__ __forceinline__ int chunks() const { return rows / kChunkValues; }
    // 16 bytes of a staged row.
    __device__ __forceinline__ uint4 *staged(int row, int chunk) const {
        return reinterpret_cast<uint4 *>(staging + row * pitch() + chunk * 16);
    }
};

// An Operation's Fetched where there is nothing to fetch.
struct Nothing {};

// What a lane writes in a unit, where a tile's rows are all one run of rows: 16 bytes of one token.
struct UnitPlace {
    int place;  // of the warp's 16 tokens
    int chunk;
    int token;
    int row;

    __device__ __forceinline__ UnitPlace(int unit, const WarpTile &tile) {
        int index = unit * kWarp + tile.lane;
        place = index / tile.chunks();
        chunk = index % tile.chunks();
        token = tile.first_token + place;
        row = tile.row_tile * tile.rows + chunk * kChunkValues;
    }
    __device__ __forceinline__ bool exists(const WarpTile &tile, int num_rows) const {
        return token < tile.num_tokens && row < num_rows;
    }
    __device__ __forceinline__ size_t offset(int num_rows) const { return (size_t)token * num_rows + row; }
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
    store_matrix_x4(shared_address(tile.staged(row, chunk)), low0, high0, low1, high1);
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

// A staged tile at once.
template <int kCount, typename Operation>
static __device__ __forceinline__ void write_units(const Operation &operation, const WarpTile &tile) {
    typename Operation::Fetched fetched[kCount];
#pragma unroll
    for (int unit = 0; unit < kCount; ++unit) fetched[unit] = operation.fetch(unit, tile);
#pragma unroll
    for (int unit = 0; unit < kCount; ++unit) operation.write(unit, tile, fetched[unit]);
}

template <typename Operation>
static __device__ __forceinline__ void produce(uint32_t ring, RingBarriers<kStages> &barriers,
                                               const ManyMaps &maps, const ManyTiles &tiles,
                                               const Operation &operation) {
    Producer<kStages> producer(ring, barriers, maps);
    bool has_begun = false;
    for (int index = blockIdx.x; index < tiles.token_tiles * tiles.row_tiles; index += gridDim.x) {
        TilePlace place = tile_place(tiles, index);
        int first_token = place.token_tile * kBlockTokens, k_tile = 0;
        PartPlace parts[Operation::kParts];
#pragma unroll
        for (int p = 0; p < Operation::kParts; ++p) parts[p] = operation.part(place.row_tile, p);
        if (!has_begun) k_tile = producer.begin(parts, first_token, 0, tiles.k_tiles);
        has_begun = true;
        for (; k_tile < tiles.k_tiles; ++k_tile) producer.fill(parts, first_token, k_tile);
    }
}

// What is left to be done with a staged tile, a unit at a time. A unit's `Fetched` is asked for one call
// before it is used, so that nobody waits for the memory.
template <typename Operation>
class UnitWriter {
   public:
    __device__ __forceinline__ UnitWriter(const Operation &operation, const WarpTile &tile)
        : operation_(operation), tile_(tile) {}

    __device__ __forceinline__ void begin() { next_ = 0; }
    __device__ __forceinline__ bool is_done() const { return next_ > Operation::kUnits; }

    __device__ __forceinline__ void advance() {
        if (is_done()) return;
        if (next_ > 0) operation_.write(next_ - 1, tile_, fetched_);
        if (next_ < Operation::kUnits) fetched_ = operation_.fetch(next_, tile_);
        ++next_;
    }

   private:
    const Operation &operation_;
    const WarpTile &tile_;
    typename Operation::Fetched fetched_ = {};
    int next_ = Operation::kUnits + 1;  // the unit to be fetched; the one before it is to be written
};

// Two accumulators by turns: a chunk's sums are added, and a tile's staged, while the next chunk's products
// are computed.
template <typename Operation>
static __device__ __forceinline__ void consume(uint32_t ring, RingBarriers<kStages> &barriers,
                                               const ManyTiles &tiles, const Operation &operation,
                                               unsigned char *staging, int consumer_warp, int lane) {
    int consumer = consumer_warp * kWarp / kWarpgroup;
    RingPlace ring_place;
    WarpTile tile = {staging, kBlockRows, 0, tiles.num_tokens, 0, lane};
    UnitWriter<Operation> writer(operation, tile);
    int num_tiles = tiles.token_tiles * tiles.row_tiles;
    int index = blockIdx.x, first_k_tile = 0;  // of the chunk to be multiplied
    int done_index = index, done_k_tile = 0;   // of the one before: where it ends
    float sum[kSums], acc[2][kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = acc[1][i] = -0.0f;  // adding it changes no bit
    auto take = [&](const float (&previous)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] = __fadd_rn(sum[i], previous[i]);
        if (done_k_tile < tiles.k_tiles) return;
        while (!writer.is_done()) writer.advance();
        __syncwarp();  // what was staged is written
        TilePlace place = tile_place(tiles, done_index);
        tile.first_token = place.token_tile * kBlockTokens + consumer_warp * kWarpTokens;
        tile.row_tile = place.row_tile;
        if (operation.take(sum, tile)) writer.begin();
        __syncwarp();  // every lane's sums are staged
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] = -0.0f;
    };
    auto turn = [&](float (&next)[kSums], const float (&previous)[kSums]) {
        int count = min(kTilesPerChunk, tiles.k_tiles - first_k_tile);
        multiply_chunk(
            next, ring, barriers, count, consumer, lane, ring_place, [&] { take(previous); },
            [&] { writer.advance(); });
        done_index = index;
        done_k_tile = first_k_tile += count;
        if (first_k_tile == tiles.k_tiles) {
            first_k_tile = 0;
            index += gridDim.x;
        }
    };
    take_turns(acc, turn, [&] { return index >= num_tiles; });
    take(acc[1]);
    if (!writer.is_done()) write_units<Operation::kUnits>(operation, tile);
}

template <typename Operation>
static __global__ void __launch_bounds__(kManyThreads, 1)
    linear_many_kernel(const __grid_constant__ ManyMaps maps, ManyTiles tiles, Operation operation) {
    extern __shared__ __align__(kAlignment) unsigned char shared[];
    RingBarriers<kStages> &barriers = *reinterpret_cast<RingBarriers<kStages> *>(shared + kBarriersAt);
    uint32_t ring = shared_address(shared);
    unsigned char *staging = shared + kStages * kStageBytes;
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (threadIdx.x == 0) barriers.init();
    __syncthreads();  // the barriers are initialised before anyone arrives or waits
    let_next_kernel_start();
    if (warp < kWarpgroup / kWarp) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce(ring, barriers, maps, tiles, operation);
    } else {
        take_registers<kConsumerRegisters>();
        wait_for_previous_kernel();
        if (tiles.counted != nullptr) tiles.num_tokens = *tiles.counted;
        int consumer_warp = warp - kWarpgroup / kWarp;
        consume(ring, barriers, tiles, operation, staging + consumer_warp * kWarpTokens * kStagingPitch,
                consumer_warp, lane);
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
              (rows + kBlockRows - 1) / kBlockRows, nullptr};
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
