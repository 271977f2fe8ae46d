// decode_grid.cuh -- who meets whom in the persistent decode kernel: the warps of a block, and the blocks.
//
// Between two phases all blocks meet at a counter in memory. Two warps of each keep these meetings, so that
// the consumers need not stand by: they go on with what needs no other block. What a meeting costs is the
// fence, some 1 us while weights stream, and the polls of 132 blocks, which slow down stores and arrivals.

#pragma once
#include "../common/ptx.cuh"
#include "../common/vector.cuh"

constexpr int kConsumerWarps = 12;
constexpr int kConsumers = kConsumerWarps * kWarp;
// Registers are handed on by warpgroups: the producer's, with the two warps that keep the grid's barriers and
// one that idles, gives the consumers those that hold weights.
constexpr int kStepThreads = kConsumers + 4 * kWarp;
constexpr unsigned kPollPause = 100;  // ns

// The workspace: counters for the grid barriers and for the end.
struct StepCounters {
    unsigned arrivals;
    unsigned finished;
    unsigned padding[30];  // to another line: it is polled while the first is written
    unsigned early_arrivals;
    unsigned more_padding[31];
};

// Named barriers of a block.
constexpr int kConsumersMeet = 1, kPositionsKnown = 2;
constexpr int kStoresDone = 3, kGridArrived = 4, kFirstStoresDone = 5, kGridEarly = 6;
constexpr int kTileWarpsMeet = 7;  // and one for each further tile at work

__device__ __forceinline__ void consumer_barrier() {
    named_barrier_sync<kConsumersMeet, kConsumers>();
}

// All threads of the blocks of a cluster.
template <int kCluster>
__device__ __forceinline__ void meet_cluster() {
    if (kCluster == 1) {
        __syncthreads();
    } else {
        __syncwarp();
        cluster_arrive();
        cluster_wait();
    }
}

// The consumers tell the producer that shared.positions is written.
__device__ __forceinline__ void announce_positions() {
    named_barrier_arrive<kPositionsKnown, kConsumers + kWarp>();
}
__device__ __forceinline__ void wait_for_positions() {
    named_barrier_sync<kPositionsKnown, kConsumers + kWarp>();
}

// Waits until every thread block arrived; meanwhile the consumers do `work`, which needs no other block's
// results. A warp of its own speaks for the block: nobody who has work to do waits for the block's stores.
// kGridEarly: until every block has announced its first round; then finish_grid_barrier must follow.
template <int kAwaited, typename Work>
__device__ __forceinline__ void grid_barrier(Work work) {
    named_barrier_arrive<kStoresDone, kConsumers + kWarp>();
    work();
    named_barrier_sync<kAwaited, kConsumers + kWarp>();
}
__device__ __forceinline__ void finish_grid_barrier() {
    named_barrier_sync<kGridArrived, kConsumers + kWarp>();
}
// Before the barrier between gate/up and down: the stores of the first round are done.
__device__ __forceinline__ void announce_first_round() {
    named_barrier_arrive<kFirstStoresDone, kConsumers + kWarp>();
}

// The warp that keeps the next `count` barriers of one kind: once the consumers' stores are done it arrives
// for the block, and tells them when all blocks have.
template <int kStores, int kAwaited>
static __device__ __forceinline__ void keep_grid_barriers(unsigned *counter, int count) {
    unsigned expected = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        expected += gridDim.x;
        named_barrier_sync<kStores, kConsumers + kWarp>();
        if (threadIdx.x % kWarp == 0) {
            fence_gpu();  // the block's stores are out before its arrival
            add_relaxed(counter, 1);
            // Polls slow down the other blocks' stores and arrivals: hence the pauses.
            while (load_acquire(counter) < expected) __nanosleep(kPollPause);
        }
        __syncwarp();
        named_barrier_arrive<kAwaited, kConsumers + kWarp>();
    }
}
