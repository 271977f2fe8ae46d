// decode_batch_exchange.cuh -- how thread blocks share out K: of the kRanks blocks of a tile, block r
// multiplies chunks r, r + kRanks, .. and writes each chunk's sums to memory while it multiplies the next;
// when the sums of all are there, it adds up those of its share of the tokens, in the order of the chunks.
// With one block there is nothing to exchange.
//
// A block waits for the others of its tile, whose indices are the next to its own. Blocks start in the order
// of their indices, so whoever waits waits for blocks that run or are the next to start.

#pragma once
#include "decode_batch_linear.cuh"

constexpr int kLineBytes = 128;  // of the L2 cache
constexpr int kStagedColumns = kGroupRows + kVector;

template <int kTokens_, int kRanks_>
struct SplitShape {
    static constexpr int kTokens = kTokens_, kRanks = kRanks_;
    static constexpr int kGroups = kTokens == kMostTokens && kRanks > 1 ? 2 : 1;
    using Stage = StageShape<kTokens, kGroups, kTokens == kMostTokens ? 1 : 2>;
    static constexpr int kConsumers = kGroups * kWarpgroup;
    static constexpr int kThreads =
        kConsumers + (kGroups == 2 ? kWarpgroup : kWarp);         // the producer's last
    static constexpr int kAllFragments = kTokens / 8;             // of eight tokens
    static constexpr int kFragments = kAllFragments / kRanks;     // that a block owns
    static constexpr int kPartVectors = kFragments * kConsumers;  // of a chunk's sums, what one block owns
    static constexpr int kPartBytes = kPartVectors * (int)sizeof(float4);
    static constexpr int kPartsPerStage = Stage::kBytes / kPartBytes;
    static constexpr int kStagedValues = kFragments * 8 * kStagedColumns;  // of a group
    static_assert(kRanks == 1 || (kFragments > 0 && kPartsPerStage > 0),
                  "a share each, that fits in a stage");
};

// A tile's chunk sums in memory.
struct Exchange {
    float4 *sums;        // [kRanks, num_chunks, kFragments, kConsumers]
    unsigned *arrivals;  // of the tile's blocks, twice: with their sums, and having seen the others'
    int num_chunks, rank;

    // Of the blocks' share `part` of a chunk.
    template <typename Shape>
    __device__ __forceinline__ float4 *place(int part, int chunk) const {
        return sums + (size_t)(part * num_chunks + chunk) * Shape::kPartVectors;
    }

    // Fragments first .. last - 1 of a chunk's sums.
    template <typename Shape>
    __device__ __forceinline__ void store(const float (&acc)[Shape::kTokens / 2], int chunk, int first,
                                          int last, int thread) const {
#pragma unroll
        for (int f = 0; f < Shape::kAllFragments; ++f) {
            if (f < first || f >= last) continue;
            place<Shape>(f / Shape::kFragments, chunk)[f % Shape::kFragments * Shape::kConsumers + thread] =
                make_float4(acc[4 * f], acc[4 * f + 1], acc[4 * f + 2], acc[4 * f + 3]);
        }
    }

    // By every consumer, when its last sums are stored.
    template <typename Shape>
    __device__ __forceinline__ void report(int thread) const {
        fence_async_proxy_global();  // the other blocks' copies read what this thread has stored
        named_barrier_sync<1, Shape::kConsumers>();  // every thread has stored
        if (thread != 0) return;
        fence_gpu();  // the block's sums are out before it reports
        add_relaxed(arrivals, 1);
    }

    // By the producer: until every block's sums are there.
    template <typename Shape>
    __device__ __forceinline__ void await() const {
        while (load_acquire(arrivals) < Shape::kRanks) {
        }
        fence_async_proxy_global();
    }
    // By the producer, when it has seen them: the last one leaves the counter to the next kernel.
    template <typename Shape>
    __device__ __forceinline__ void leave() const {
        if (atomicAdd(arrivals, 1) == 2 * Shape::kRanks - 1) *arrivals = 0;
    }
};

// This block's share of every chunk's sums, as many chunks at a time as a stage holds.
template <typename Shape>
static __device__ __forceinline__ void copy_parts(const Ring &ring, RingPlace &place,
                                                  const Exchange &exchange) {
    for (int first = 0; first < exchange.num_chunks; first += Shape::kPartsPerStage, place.advance(ring)) {
        int bytes = min(Shape::kPartsPerStage, exchange.num_chunks - first) * Shape::kPartBytes;
        uint32_t full = shared_address(&ring.full[place.stage]);
        barrier_wait(shared_address(&ring.empty[place.stage]), place.parity ^ 1);
        barrier_arrive_expect(full, bytes);
        copy_bulk(ring.base + place.stage * Shape::Stage::kBytes,
                  exchange.template place<Shape>(exchange.rank, first), bytes, full);
    }
}

// This block's tokens' sums, 64 rows of each group, in the order of the chunks.
template <typename Shape>
static __device__ __forceinline__ void add_parts(float (&sums)[Shape::kFragments][4], const Ring &ring,
                                                 RingPlace &place, const Exchange &exchange, int thread) {
    for (int first = 0; first < exchange.num_chunks; first += Shape::kPartsPerStage, place.advance(ring)) {
        barrier_wait(shared_address(&ring.full[place.stage]), place.parity);
        uint32_t from = ring.base + place.stage * Shape::Stage::kBytes + thread * (int)sizeof(float4);
        int count = min(Shape::kPartsPerStage, exchange.num_chunks - first);
        for (int i = 0; i < count; ++i, from += Shape::kPartBytes) {
#pragma unroll
            for (int f = 0; f < Shape::kFragments; ++f) {
                float4 v = load_shared_16(from + f * Shape::kConsumers * (int)sizeof(float4));
                const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[f][e] = __fadd_rn(sums[f][e], values[e]);
            }
        }
        release_stage(ring, place.stage);
    }
    char *parts = reinterpret_cast<char *>(exchange.template place<Shape>(exchange.rank, 0));
    for (int i = thread * kLineBytes; i < exchange.num_chunks * Shape::kPartBytes;
         i += Shape::kConsumers * kLineBytes)
        discard_line(parts + i);
}

template <typename Shape>
static __device__ __forceinline__ void consume(float (&sums)[Shape::kFragments][4], int k_tiles,
                                               const Ring &ring, const Exchange &exchange, int thread) {
#pragma unroll
    for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[f][e] = -0.0f;  // adding to it changes no bit
    }
    // Of a chunk's fragments so many are stored during each of the next one's k tiles.
    constexpr int kStoredPerTile = (Shape::kAllFragments + kTilesPerChunk - 1) / kTilesPerChunk;
    RingPlace place;
    float before[Shape::kTokens / 2];
    int stored = Shape::kAllFragments, chunk_before = 0;
    for (int chunk = exchange.rank; chunk < exchange.num_chunks; chunk += Shape::kRanks) {
        float acc[Shape::kTokens / 2];
        int count = min(kTilesPerChunk, k_tiles - chunk * kTilesPerChunk);
        if constexpr (Shape::kRanks == 1) {
            multiply_chunk<typename Shape::Stage>(acc, ring, place, 0, count, [](int) {});
#pragma unroll
            for (int i = 0; i < Shape::kTokens / 2; ++i)
                sums[i / 4][i % 4] = __fadd_rn(sums[i / 4][i % 4], acc[i]);
            continue;
        }
        multiply_chunk<typename Shape::Stage>(acc, ring, place, thread / kWarpgroup, count, [&](int) {
            if (stored == Shape::kAllFragments) return;
            exchange.store<Shape>(before, chunk_before, stored, stored + kStoredPerTile, thread);
            stored += kStoredPerTile;
        });
        exchange.store<Shape>(before, chunk_before, stored, Shape::kAllFragments, thread);
#pragma unroll
        for (int i = 0; i < Shape::kTokens / 2; ++i) before[i] = acc[i];
        stored = 0, chunk_before = chunk;
    }
    if constexpr (Shape::kRanks == 1) return;
    exchange.store<Shape>(before, chunk_before, stored, Shape::kAllFragments, thread);
    exchange.report<Shape>(thread);
    add_parts<Shape>(sums, ring, place, exchange, thread);
}
