// linear_split.cuh -- tiles of 128 tokens by 128 weight rows, each shared by two thread blocks: where there
// are too few tiles for every multiprocessor.
//
// The two blocks, a cluster, take the chunks of 512 k's by turns. Each keeps the sums of half of the tile's
// rows: it sends the other half of every chunk to its neighbour's shared memory, and adds its own and its
// neighbour's chunks in the contract's order, one turn late, so that nobody waits for what is on its way.
//
// An Operation has finish_half(sum, tile): takes the sums of half a tile's rows and writes what becomes of
// them.

#pragma once
#include "linear_many.cuh"

constexpr int kSplit = 2;
constexpr int kHalfRows = kBlockRows / kSplit;
constexpr int kHalfSums = kSums / kSplit;
constexpr int kHalfChunks = kHalfRows / kChunkValues;
constexpr int kHalfUnits = kWarpTokens * kHalfChunks / kWarp;
constexpr int kHalfPitch = kHalfRows * (int)sizeof(bf16) + 16;
constexpr int kSplitStages = 4;
constexpr int kSlots = 2;  // turns on their way: one read, one written
constexpr int kSlotBytes = kConsumers * kWarpgroup * kHalfSums * (int)sizeof(float);
constexpr int kWarpSlotBytes = kWarp * kHalfSums * (int)sizeof(float);
constexpr int kSplitSharedBytes = kSplitStages * kStageBytes + kSlots * kSlotBytes + kAlignment;
static_assert(kWarpTokens * kHalfPitch <= kWarpSlotBytes, "what is staged takes a slot's place");

struct SplitBarriers {
    uint64_t full[kSplitStages];
    uint64_t empty[kSplitStages];
    uint64_t arrived[kSlots][kConsumerWarps];  // a turn's sums from the neighbour
};

static __device__ __forceinline__ void produce_split(uint32_t ring, SplitBarriers &barriers,
                                                     const ManyMaps &maps, const ManyTiles &tiles,
                                                     int first_token, int first_row, int rank) {
    int count = 0;
    for (int first_tile = rank * kTilesPerChunk; first_tile < tiles.k_tiles;
         first_tile += kSplit * kTilesPerChunk) {
        for (int k_tile = first_tile; k_tile < first_tile + kTilesPerChunk; ++k_tile, ++count) {
            int stage = count % kSplitStages;
            uint32_t full = shared_address(&barriers.full[stage]), at = ring + stage * kStageBytes;
            barrier_wait(shared_address(&barriers.empty[stage]), (count / kSplitStages + 1) % 2);
            barrier_arrive_expect(full, kStageBytes);
            copy_box_2d(at, &maps.tokens, k_tile * kTileCols, first_token, full);
            copy_box_3d(at + kTokenTileBytes, &maps.weights[0], 0, k_tile, first_row / kStripRows, full);
        }
    }
}

// One chunk of 64 tokens x 128 rows.
static __device__ __forceinline__ void multiply_chunk(float (&acc)[kSums], uint32_t ring,
                                                      SplitBarriers &barriers, int consumer, int lane,
                                                      int &count) {
    auto release = [&](int stage) {
        if (lane == 0) barrier_arrive(shared_address(&barriers.empty[stage]));
    };
    for (int i = 0; i < kTilesPerChunk; ++i, ++count) {
        int stage = count % kSplitStages;
        barrier_wait(shared_address(&barriers.full[stage]), count / kSplitStages % 2);
        uint32_t at = ring + stage * kStageBytes;
        uint64_t tokens = matrix_descriptor(at + consumer * kConsumerTokens * kTileRowBytes);
        uint64_t weights = matrix_descriptor(at + kTokenTileBytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kStepsPerTile; ++step) {
            uint64_t offset = (uint64_t)(step * kStepBytes >> 4);
            wgmma_k16(acc, tokens + offset, weights + offset, i + step > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the previous tile is read: its stage may be filled again
        if (i > 0) release((count - 1) % kSplitStages);
    }
    wgmma_wait<0>();
    release((count - 1) % kSplitStages);
}

// This warp's exchange with the same warp of the other block.
struct Exchange {
    uint32_t slots;    // this thread's place in the first slot: columns of 16 bytes per thread
    uint32_t arrived;  // this warp's barrier of the first slot
    int rank;
    int lane;

    // Sends half of a chunk's sums; `from` are those of the other block's rows.
    template <int kFirst>
    __device__ __forceinline__ void send(const float (&acc)[kSums], int slot) const {
        uint32_t to = map_shared(slots + slot * kSlotBytes, rank ^ 1);
        uint32_t barrier = map_shared(arrived + slot * kConsumerWarps * (int)sizeof(uint64_t), rank ^ 1);
#pragma unroll
        for (int i = 0; i < kHalfSums; i += 4)
            store_async_16(to + i / 4 * kWarp * 16, &acc[kFirst + i], barrier);
    }

    // Adds a turn's two chunks in order: the first is that of the block of rank 0.
    __device__ __forceinline__ void add_turn(float (&sum)[kHalfSums], const float (&own)[kHalfSums],
                                             int turn) const {
        int slot = turn % kSlots;
        barrier_wait(arrived + slot * kConsumerWarps * (int)sizeof(uint64_t), turn / kSlots % 2);
#pragma unroll
        for (int i = 0; i < kHalfSums; i += 4) {
            float4 values = load_shared_16(slots + slot * kSlotBytes + i / 4 * kWarp * 16);
            const float other[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float first = rank == 0 ? own[i + e] : other[e], second = rank == 0 ? other[e] : own[i + e];
                sum[i + e] = __fadd_rn(__fadd_rn(sum[i + e], first), second);
            }
        }
    }
};

// The sums of this block's half of the rows, for 64 tokens.
static __device__ __forceinline__ void consume_split(float (&sum)[kHalfSums], uint32_t ring,
                                                     SplitBarriers &barriers, const Exchange &exchange,
                                                     int num_turns, int consumer) {
    float own[kHalfSums];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kHalfSums; ++i) sum[i] = -0.0f;  // adding to it changes no bit
    for (int turn = 0; turn < num_turns; ++turn) {
        float acc[kSums];
        int slot = turn % kSlots;
        // The neighbour sends this turn's sums after it has ours of the turn before.
        if (exchange.lane == 0)
            barrier_arrive_expect(exchange.arrived + slot * kConsumerWarps * (int)sizeof(uint64_t),
                                  kWarpSlotBytes);
        multiply_chunk(acc, ring, barriers, consumer, exchange.lane, count);
        if (turn > 0) exchange.add_turn(sum, own, turn - 1);
        if (exchange.rank == 0) {
            exchange.send<kHalfSums>(acc, slot);
        } else {
            exchange.send<0>(acc, slot);
        }
#pragma unroll
        for (int i = 0; i < kHalfSums; ++i) own[i] = exchange.rank == 0 ? acc[i] : acc[kHalfSums + i];
    }
    exchange.add_turn(sum, own, num_turns - 1);
}

template <typename Operation>
static __global__ void __launch_bounds__(kManyThreads, 1)
    linear_split_kernel(const __grid_constant__ ManyMaps maps, ManyTiles tiles, Operation operation) {
    extern __shared__ unsigned char shared[];
    __shared__ SplitBarriers barriers;
    uint32_t base = shared_address(shared);
    uint32_t ring = (base + kAlignment - 1) / kAlignment * kAlignment;
    uint32_t slots = ring + kSplitStages * kStageBytes;
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warpgroup = threadIdx.x / kWarpgroup;
    int rank = blockIdx.x % kSplit, tile_index = blockIdx.x / kSplit;
    TilePlace place = tile_place(tiles, tile_index);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kSplitStages; ++i) {
            barrier_init(shared_address(&barriers.full[i]), 1);
            barrier_init(shared_address(&barriers.empty[i]), kConsumerWarps);
        }
        for (int i = 0; i < kSlots * kConsumerWarps; ++i)
            barrier_init(shared_address(&barriers.arrived[0][i]), 1);
        barrier_init_fence();
    }
    // The barriers of both blocks are initialised before anyone arrives or sends.
    cluster_arrive();
    cluster_wait();
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (warpgroup == 0) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x == 0)
            produce_split(ring, barriers, maps, tiles, place.token_tile * kBlockTokens,
                          place.row_tile * kBlockRows, rank);
    } else {
        take_registers<kConsumerRegisters>();
        int consumer_warp = warp - kWarpgroup / kWarp;
        Exchange exchange = {slots + consumer_warp * kWarpSlotBytes + lane * 16,
                             shared_address(&barriers.arrived[0][consumer_warp]), rank, lane};
        float sum[kHalfSums];
        consume_split(sum, ring, barriers, exchange, tiles.k_tiles / kTilesPerChunk / kSplit,
                      warpgroup - 1);
        // The last turn has arrived: this warp's slot is its own.
        WarpTile tile = {shared + (slots - base) + consumer_warp * kWarpSlotBytes,
                         kHalfPitch,
                         place.token_tile * kBlockTokens + consumer_warp * kWarpTokens,
                         tiles.num_tokens,
                         place.row_tile * kSplit + rank,
                         lane};
        operation.finish_half(sum, tile);
    }
}

template <typename Operation>
static Status launch_split(const Operation &operation, const ManyMaps &maps, const ManyTiles &tiles,
                           cudaStream_t stream) {
    int num_blocks = tiles.token_tiles * tiles.row_tiles * kSplit;
    return launch_chained(linear_split_kernel<Operation>, dim3((unsigned)num_blocks), kManyThreads,
                          kSplitSharedBytes, kSplit, stream, maps, tiles, operation);
}

// Whether a layer is worth splitting, and can be: whole turns of whole chunks.
static inline bool splits(const ManyTiles &tiles, int num_multiprocessors) {
    return tiles.token_tiles * tiles.row_tiles * kSplit <= num_multiprocessors &&
           tiles.k_tiles % (kSplit * kTilesPerChunk) == 0;
}
