// linear_split.cuh -- tiles of 128 tokens by 128 weight rows, each shared by two thread blocks: where there
// are too few tiles for every multiprocessor.
//
// The two blocks, a cluster, take the chunks of 512 k's by turns. Each keeps the sums of half of the tile's
// rows: it sends the other half of every chunk to its neighbour's shared memory, and adds its own and its
// neighbour's chunks in the contract's order, one turn late, so that nobody waits for what is on its way.
//
// An Operation is linear_many.cuh's, of one part, for tiles of half the rows too: row_tile counts halves.

#pragma once
#include "linear_many.cuh"

constexpr int kSplit = 2;
constexpr int kHalfRows = kBlockRows / kSplit;
constexpr int kHalfSums = kSums / kSplit;
constexpr int kHalfUnits = kWarpTokens * kHalfRows / kChunkValues / kWarp;
constexpr int kSplitStages = 5;
constexpr int kSlots = 2;  // turns on their way: one read, one written
constexpr int kSlotBytes = kConsumers * kWarpgroup * kHalfSums * (int)sizeof(float);
constexpr int kWarpSlotBytes = kWarp * kHalfSums * (int)sizeof(float);
constexpr int kSplitSharedBytes = kSplitStages * kStageBytes + kSlots * kSlotBytes;
static_assert(kWarpTokens * (kHalfRows * (int)sizeof(bf16) + 16) <= kWarpSlotBytes,
              "what is staged takes a slot's place");

struct SplitBarriers {
    RingBarriers<kSplitStages> ring;
    uint64_t arrived[kSlots][kConsumerWarps];  // a turn's sums from the neighbour
};

static __device__ __forceinline__ void produce_split(uint32_t ring, SplitBarriers &barriers,
                                                     const ManyMaps &maps, const ManyTiles &tiles,
                                                     const TilePlace &place, int rank) {
    Producer<kSplitStages> producer(ring, barriers.ring, maps);
    const PartPlace parts[1] = {{0, place.row_tile * kBlockRows}};
    int first_token = place.token_tile * kBlockTokens, num_own = tiles.k_tiles / kSplit;
    auto k_tile = [&](int own) {
        return (own / kTilesPerChunk * kSplit + rank) * kTilesPerChunk + own % kTilesPerChunk;
    };
    for (int own = producer.begin(parts, first_token, k_tile(0), kTilesPerChunk); own < num_own; ++own)
        producer.fill(parts, first_token, k_tile(own));
}

// This warp's exchange with the same warp of the other block.
struct Exchange {
    uint32_t slots;    // this thread's place in the first slot: columns of 16 bytes per thread
    uint32_t arrived;  // this warp's barrier of the first slot
    int rank;
    int lane;

    // Sends a chunk's sums of the other block's rows.
    __device__ __forceinline__ void send(const float (&acc)[kSums], int turn) const {
        float others[kHalfSums];  // chosen before the branch: other products are under way
#pragma unroll
        for (int i = 0; i < kHalfSums; ++i) others[i] = rank == 0 ? acc[kHalfSums + i] : acc[i];
        if (turn < 0) return;
        int slot = turn % kSlots;
        uint32_t barrier = arrived + slot * kConsumerWarps * (int)sizeof(uint64_t);
        // The neighbour sends this turn's sums after it has ours of the turn before.
        if (lane == 0) barrier_arrive_expect(barrier, kWarpSlotBytes);
        uint32_t to = map_shared(slots + slot * kSlotBytes, rank ^ 1);
        barrier = map_shared(barrier, rank ^ 1);
#pragma unroll
        for (int i = 0; i < kHalfSums; i += 4) store_async_16(to + i / 4 * kWarp * 16, &others[i], barrier);
    }

    // Adds a turn's two chunks in order: the first is that of the block of rank 0.
    __device__ __forceinline__ void add(float (&sum)[kHalfSums], const float (&acc)[kSums],
                                        int turn) const {
        float own[kHalfSums];
#pragma unroll
        for (int i = 0; i < kHalfSums; ++i) own[i] = rank == 0 ? acc[i] : acc[kHalfSums + i];
        if (turn < 0) return;
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

// The sums of this block's half of the rows, for 64 tokens. Two accumulators by turns: a chunk's sums are
// sent and added while the next chunk's products are computed.
template <typename WhileOnTheirWay>
static __device__ __forceinline__ void consume_split(float (&sum)[kHalfSums], uint32_t ring,
                                                     SplitBarriers &barriers, const Exchange &exchange,
                                                     int num_turns, int consumer,
                                                     WhileOnTheirWay while_on_their_way) {
    float acc[2][kSums];
    RingPlace place;
    int turn = 0;
#pragma unroll
    for (int i = 0; i < kHalfSums; ++i) sum[i] = -0.0f;  // adding to it changes no bit
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[1][i] = 0.0f;  // of no turn
    auto take_turn = [&](float (&next)[kSums], const float (&previous)[kSums]) {
        multiply_chunk(
            next, ring, barriers.ring, kTilesPerChunk, consumer, exchange.lane, place,
            [&] { exchange.send(previous, turn - 1); }, [] {});
        exchange.add(sum, previous, turn - 1);
        ++turn;
    };
    take_turns(acc, take_turn, [&] { return turn == num_turns; });
    exchange.send(acc[1], turn - 1);
    while_on_their_way();
    exchange.add(sum, acc[1], turn - 1);
}

template <typename Operation>
static __global__ void __launch_bounds__(kManyThreads, 1)
    linear_split_kernel(const __grid_constant__ ManyMaps maps, ManyTiles tiles, Operation operation) {
    extern __shared__ __align__(kAlignment) unsigned char shared[];
    __shared__ SplitBarriers barriers;
    uint32_t ring = shared_address(shared), slots = ring + kSplitStages * kStageBytes;
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int rank = blockIdx.x % kSplit, tile_index = blockIdx.x / kSplit;
    TilePlace place = tile_place(tiles, tile_index);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kSlots * kConsumerWarps; ++i)
            barrier_init(shared_address(&barriers.arrived[0][i]), 1);
        barriers.ring.init();
    }
    // The barriers of both blocks are initialised before anyone arrives or sends.
    cluster_arrive();
    cluster_wait();
    let_next_kernel_start();
    if (warp < kWarpgroup / kWarp) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce_split(ring, barriers, maps, tiles, place, rank);
    } else {
        take_registers<kConsumerRegisters>();
        wait_for_previous_kernel();
        int consumer_warp = warp - kWarpgroup / kWarp;
        // After the last turn this warp's slot is its own.
        WarpTile tile = {shared + (slots - ring) + consumer_warp * kWarpSlotBytes,
                         kHalfRows,
                         place.token_tile * kBlockTokens + consumer_warp * kWarpTokens,
                         tiles.num_tokens,
                         place.row_tile * kSplit + rank,
                         lane};
        typename Operation::Fetched fetched[kHalfUnits];
        Exchange exchange = {slots + consumer_warp * kWarpSlotBytes + lane * 16,
                             shared_address(&barriers.arrived[0][consumer_warp]), rank, lane};
        float sum[kHalfSums];
        consume_split(sum, ring, barriers, exchange, tiles.k_tiles / kTilesPerChunk / kSplit,
                      consumer_warp * kWarp / kWarpgroup, [&] {
#pragma unroll
                          for (int unit = 0; unit < kHalfUnits; ++unit)
                              fetched[unit] = operation.fetch(unit, tile);
                      });
        __syncwarp();  // every lane has read the slot that is about to be staged over
        operation.take(sum, tile);
        __syncwarp();  // every lane's sums are staged
#pragma unroll
        for (int unit = 0; unit < kHalfUnits; ++unit) operation.write(unit, tile, fetched[unit]);
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
