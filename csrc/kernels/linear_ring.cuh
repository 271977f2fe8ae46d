// linear_ring.cuh -- tiles of 128 tokens by 128 weight rows through a ring in shared memory: what the
// linear layers' kernels for many tokens share.
//
// One thread asks the copy engine for k tiles of 64 as they are used up; two warpgroups multiply 64 tokens
// each.

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
constexpr int kProducerRegisters = 40;  // per thread; every one starts with 168 of the 65536
constexpr int kConsumerRegisters = 232;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= kManyThreads / kWarpgroup * 168,
              "nobody gets registers that nobody gives back: the kernel would wait for ever");
constexpr int kConsumerTokens = 64;  // rows of one wgmma
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kBlockTokens = kConsumers * kConsumerTokens;
constexpr int kBlockRows = 128;                                   // columns of one wgmma
constexpr int kSums = kConsumerTokens * kBlockRows / kWarpgroup;  // of a thread
constexpr int kTileRowBytes = kTileCols * (int)sizeof(bf16);
constexpr int kTokenTileBytes = kBlockTokens * kTileRowBytes;
constexpr int kStageBytes = kTokenTileBytes + kBlockRows * kTileRowBytes;
constexpr int kTilesPerChunk = NUMERICS_CHUNK / kTileCols;
constexpr int kStepsPerTile = kTileCols / NUMERICS_STEP;
constexpr int kStepBytes = NUMERICS_STEP * (int)sizeof(bf16);
constexpr int kMaxMatrices = 3;
constexpr int kAlignment = 1024;  // of a swizzled tile

struct ManyMaps {
    CUtensorMap tokens;
    CUtensorMap weights[kMaxMatrices];
};

struct ManyTiles {
    int num_tokens;
    int k_tiles;
    int token_tiles;
    int row_tiles;
    const int *counted;  // where a step keeps its number of tokens, or null: num_tokens
};

struct PartPlace {
    int matrix;
    int row;
};

// `full` counts the producer and the bytes; `empty` every warp that reads them.
template <int kNumStages>
struct RingBarriers {
    uint64_t full[kNumStages];
    uint64_t empty[kNumStages];

    __device__ __forceinline__ void init() {
        for (int i = 0; i < kNumStages; ++i) {
            barrier_init(shared_address(&full[i]), 1);
            barrier_init(shared_address(&empty[i]), kConsumerWarps);
        }
        barrier_init_fence();
    }
};

// Where one is in the ring; goes on from tile to tile.
struct RingPlace {
    int stage = 0;
    int parity = 0;     // of the turn
    int previous = -1;  // the stage before this one, if any

    template <int kNumStages>
    __device__ __forceinline__ void advance() {
        stage = stage + 1 < kNumStages ? stage + 1 : 0;
        parity ^= stage == 0;
    }
};

// The thread that asks the copy engine for k tiles, turn after turn of the ring.
template <int kNumStages>
class Producer {
   public:
    __device__ __forceinline__ Producer(uint32_t ring, RingBarriers<kNumStages> &barriers,
                                        const ManyMaps &maps)
        : ring_(ring), barriers_(barriers), maps_(maps) {}

    // The first k tiles of a step's first tile. Weights change in no step, so their copies need not wait
    // for the previous kernel; the tokens follow when it has ended. Returns how many it asked for.
    template <int kParts>
    __device__ __forceinline__ int begin(const PartPlace (&parts)[kParts], int first_token,
                                         int first_k_tile, int num_k_tiles) {
        int count = min(num_k_tiles, kNumStages);
        for (int i = 0; i < count; ++i) copy_weights(parts, first_k_tile + i, i);
        wait_for_previous_kernel();
        for (int i = 0; i < count; ++i) copy_tokens(first_token, first_k_tile + i, i);
        place_ = {count % kNumStages, count == kNumStages, -1};
        return count;
    }

    template <int kParts>
    __device__ __forceinline__ void fill(const PartPlace (&parts)[kParts], int first_token, int k_tile) {
        // A stage's first turn waits for nobody.
        barrier_wait(shared_address(&barriers_.empty[place_.stage]), place_.parity ^ 1);
        copy_weights(parts, k_tile, place_.stage);
        copy_tokens(first_token, k_tile, place_.stage);
        place_.template advance<kNumStages>();
    }

   private:
    // Each part of the weights' rows is a box.
    template <int kParts>
    __device__ __forceinline__ void copy_weights(const PartPlace (&parts)[kParts], int k_tile, int stage) {
        constexpr int kPartBytes = kBlockRows / kParts * kTileRowBytes;
        uint32_t full = shared_address(&barriers_.full[stage]);
        uint32_t at = ring_ + stage * kStageBytes + kTokenTileBytes;
        barrier_arrive_expect(full, kStageBytes);
#pragma unroll
        for (int p = 0; p < kParts; ++p)
            copy_box_3d(at + p * kPartBytes, &maps_.weights[parts[p].matrix], 0, k_tile,
                        parts[p].row / kStripRows, full);
    }

    __device__ __forceinline__ void copy_tokens(int first_token, int k_tile, int stage) {
        copy_box_2d(ring_ + stage * kStageBytes, &maps_.tokens, k_tile * kTileCols, first_token,
                    shared_address(&barriers_.full[stage]));
    }

    uint32_t ring_;
    RingBarriers<kNumStages> &barriers_;
    const ManyMaps &maps_;
    RingPlace place_;
};

// A chunk of `count` k tiles for 64 tokens x 128 rows. While the tensor cores work: before_over() once the
// products before this chunk are over, meanwhile() after each further k tile. The chunk's own products are
// over when the next one's before_over() is called.
template <int kNumStages, typename BeforeOver, typename Meanwhile>
static __device__ __forceinline__ void multiply_chunk(float (&acc)[kSums], uint32_t ring,
                                                      RingBarriers<kNumStages> &barriers, int count,
                                                      int consumer, int lane, RingPlace &place,
                                                      BeforeOver before_over, Meanwhile meanwhile) {
    auto multiply = [&](bool accumulates) {
        barrier_wait(shared_address(&barriers.full[place.stage]), place.parity);
        uint32_t at = ring + place.stage * kStageBytes;
        uint64_t tokens = matrix_descriptor(at + consumer * kConsumerTokens * kTileRowBytes);
        uint64_t weights = matrix_descriptor(at + kTokenTileBytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kStepsPerTile; ++step) {
            uint64_t offset = (uint64_t)(step * kStepBytes >> 4);
            wgmma_k16(acc, tokens + offset, weights + offset, accumulates || step > 0);
        }
        wgmma_commit();
    };
    // A warp knows only that its own reads are over.
    auto release_previous = [&] {
        if (lane == 0 && place.previous >= 0)
            barrier_arrive(shared_address(&barriers.empty[place.previous]));
        place.previous = place.stage;
        place.template advance<kNumStages>();
    };
    multiply(false);
    wgmma_wait<1>();
    release_previous();
    before_over();
    for (int i = 1; i < count; ++i) {
        multiply(true);
        meanwhile();
        wgmma_wait<1>();  // the previous tile is read: its stage may be filled again
        release_previous();
    }
}

// turn(next, previous) for chunk after chunk, two accumulators by turns; what the last one gave is in the
// second. ptxas must see for which of them products are under way: a turn reads `previous` in no branch, or
// it puts a wait behind every product.
template <typename Turn, typename IsOver>
static __device__ __forceinline__ void take_turns(float (&acc)[2][kSums], Turn turn, IsOver is_over) {
    while (true) {
        turn(acc[0], acc[1]);
        if (is_over()) {
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < kSums; ++i) acc[1][i] = acc[0][i];
            return;
        }
        turn(acc[1], acc[0]);
        if (is_over()) {
            wgmma_wait<0>();
            return;
        }
    }
}
