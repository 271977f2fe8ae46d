// decode_batch_exchange.cuh -- how the thread blocks of a cluster share out K: rank r multiplies chunks r,
// r + ranks, .. and sends each chunk's sums to the blocks that own its tokens, which add them in order.
//
// A round is one chunk of every rank. The sums of a round are added up while the next round's chunk is
// multiplied; one buffer serves all rounds.

#pragma once
#include "decode_batch_linear.cuh"

constexpr int kStagedColumns = kGroupRows + kVector;

// The ranks' chunk sums of a round in their owner's memory: [groups][ranks][fragments][kWarpgroup] float4.
template <int kTokens_, int kRanks_>
struct SplitShape {
    static constexpr int kTokens = kTokens_, kRanks = kRanks_;
    static constexpr int kGroups = kTokens == kMostTokens ? 2 : 1;
    using Stage = StageShape<kTokens, kGroups, kMostTokens / kTokens>;
    static constexpr int kConsumers = kGroups * kWarpgroup;
    static constexpr int kThreads =
        kConsumers + (kGroups == 2 ? kWarpgroup : kWarp);                     // the producer's last
    static constexpr int kAllFragments = kTokens / 8;                         // of eight tokens
    static constexpr int kFragments = (kAllFragments + kRanks - 1) / kRanks;  // that a block owns at most
    static constexpr int kRankBytes = kFragments * kWarpgroup * 16;
    static constexpr int kGroupBytes = kRanks * kRankBytes;
    static constexpr int kBufferBytes = kGroups * kGroupBytes;
    static_assert(kFragments * 8 * kStagedColumns * (int)sizeof(bf16) <= kGroupBytes,
                  "staged in the buffer");

    static __device__ int own_fragments(int rank) {
        return max(0, min(kFragments, kAllFragments - rank * kFragments));
    }
};

// A group's exchange of chunk sums: the same warpgroup of every block of the cluster takes part.
struct Exchange {
    uint32_t buffer;    // this group's
    uint32_t received;  // a round's sums are in the buffer
    uint32_t folded;    // by every warp of every block: the buffers may be written again
};

template <typename Shape>
static __device__ __forceinline__ void send_chunk(const float (&acc)[Shape::kTokens / 2],
                                                  const Exchange &exchange, int rank, int member) {
#pragma unroll
    for (int f = 0; f < Shape::kAllFragments; ++f) {
        int owner = f / Shape::kFragments, place_of_owner = f % Shape::kFragments;
        uint32_t to =
            exchange.buffer + rank * Shape::kRankBytes + (place_of_owner * kWarpgroup + member) * 16;
        store_async_16(map_shared(to, owner), &acc[4 * f], map_shared(exchange.received, owner));
    }
}

// Adds a round's chunk sums, which are on their way, to this block's, in the order of the chunks.
template <typename Shape>
static __device__ __forceinline__ void fold_round(float (&sums)[Shape::kFragments][4],
                                                  const Exchange &exchange, int round, int num_senders,
                                                  bool is_last, int rank, int member) {
    int own = Shape::own_fragments(rank);
    if (member == 0) barrier_arrive_expect(exchange.received, num_senders * own * kWarpgroup * 16);
    barrier_wait(exchange.received, round % 2);
#pragma unroll
    for (int sender = 0; sender < Shape::kRanks; ++sender) {
        if (sender >= num_senders) break;
#pragma unroll
        for (int f = 0; f < Shape::kFragments; ++f) {
            if (f >= own) break;
            float4 v = load_shared_16(exchange.buffer + sender * Shape::kRankBytes +
                                      (f * kWarpgroup + member) * 16);
            const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[f][e] = __fadd_rn(sums[f][e], values[e]);
        }
    }
    __syncwarp();  // the warp has read the buffer
    int lane = member % kWarp;
    if (!is_last && lane < Shape::kRanks) barrier_arrive_remote(map_shared(exchange.folded, lane));
}

// This block's tokens' sums, 64 rows, in the order of the chunks.
template <typename Shape>
static __device__ __forceinline__ void consume(float (&sums)[Shape::kFragments][4], int k_tiles,
                                               const Ring &ring, const Exchange &exchange, int rank,
                                               int group, int member) {
    int num_chunks = (k_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
    int num_rounds = (num_chunks + Shape::kRanks - 1) / Shape::kRanks;
    RingPlace place;
#pragma unroll
    for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[f][e] = -0.0f;  // adding to it changes no bit
    }
    auto fold = [&](int round) {
        fold_round<Shape>(sums, exchange, round, min(Shape::kRanks, num_chunks - round * Shape::kRanks),
                          round == num_rounds - 1, rank, member);
    };
    for (int round = 0; round < num_rounds; ++round) {
        int chunk = round * Shape::kRanks + rank;
        bool has_chunk = chunk < num_chunks;
        int count = min(kTilesPerChunk, k_tiles - chunk * kTilesPerChunk);
        float acc[Shape::kTokens / 2];
        // The sums of the round before are added while the tensor cores work.
        if (has_chunk) {
            multiply_chunk<typename Shape::Stage>(acc, ring, place, group, count, [&](int i) {
                if (round > 0 && i == count - 1) fold(round - 1);
            });
        } else if (round > 0) {
            fold(round - 1);
        }
        __syncwarp();
        if (round == 0) {
            cluster_wait();  // the other blocks have their barriers
        } else {
            barrier_wait_cluster(exchange.folded, (round - 1) % 2);
        }
        if (has_chunk) send_chunk<Shape>(acc, exchange, rank, member);
    }
    fold(num_rounds - 1);
}
